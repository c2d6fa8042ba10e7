"""config.json on both sides: what Transformers writes is read as what it means, and what is written is read back.

What is not implemented is refused, with the field's name: a model that was read anyway would be another one.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_hf import DIMENSIONS, hf_config

from torchtitan_style import Qwen3Config, Qwen3ForCausalLM
from torchtitan_style.models.qwen3.config import FLAVORS, YARN_FIELDS
from torchtitan_style.models.qwen3.hf import parameter_shapes, to_hf
from torchtitan_style.models.registry import read_hf_config


def from_hf(settings: dict) -> Qwen3Config:
    return read_hf_config(settings)[1]


TINY = Qwen3Config(**DIMENSIONS)
WINDOW = {"use_sliding_window": True, "sliding_window": 5}


def written(config: transformers.Qwen3Config, folder: Path) -> dict[str, Any]:
    """The config.json that Transformers makes of ``config``."""
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# Parameters

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "bias": {"attention_bias": True},
    "untied, bias": {"tie_word_embeddings": False, "attention_bias": True},
    "one key/value head": {"num_key_value_heads": 1},
    "heads wider than the model": {"head_dim": 32, "num_hidden_layers": 3},
    "one layer, odd sizes": {"num_hidden_layers": 1, "vocab_size": 199, "intermediate_size": 35, "hidden_size": 20},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_parameters_are_those_of_transformers_and_of_our_model(changes: dict[str, Any]) -> None:
    shapes = parameter_shapes(dataclasses.replace(TINY, **changes))
    with torch.device("meta"):
        theirs = transformers.Qwen3ForCausalLM(hf_config(**changes))
        ours = Qwen3ForCausalLM(dataclasses.replace(TINY, **changes))
    # As lists: the order of the layers is promised too.
    assert list(shapes.items()) == [(name, tuple(p.shape)) for name, p in theirs.named_parameters()]
    assert list(shapes.items()) == [(name, tuple(p.shape)) for name, p in ours.named_parameters()]


@pytest.mark.parametrize("flavor", FLAVORS)
def test_as_many_parameters_as_the_published_models_have(flavor: str) -> None:
    count = sum(torch.Size(shape).numel() for shape in parameter_shapes(FLAVORS[flavor]).values())
    assert count == FLAVORS[flavor].num_parameters


# From Transformers to ours

READ: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full attention": ({}, {}),
    "untied": ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
    "bias": ({"attention_bias": True}, {"attention_bias": True}),
    "other theta": ({"rope_theta": 1e6}, {"rope_theta": 1e6}),
    "theta of whole numbers": ({"rope_theta": 5_000_000}, {"rope_theta": 5e6}),
    "other eps and range": (
        {"rms_norm_eps": 1e-5, "initializer_range": 0.01},
        {"rms_norm_eps": 1e-5, "initializer_range": 0.01},
    ),
    "attention dropout": ({"attention_dropout": 0.25}, {"attention_dropout": 0.25}),
    "window in the last layer": (WINDOW | {"max_window_layers": 1}, WINDOW | {"max_window_layers": 1}),
    "window in all layers": (WINDOW | {"max_window_layers": 0}, WINDOW | {"max_window_layers": 0}),
    "window in no layer": (WINDOW, WINDOW),
    "window switched off": ({"sliding_window": 5, "max_window_layers": 1}, {"max_window_layers": 1}),
    "window after more layers than there are": ({"max_window_layers": 28}, {"max_window_layers": 28}),
}


@pytest.mark.parametrize(("changes", "expected"), READ.values(), ids=READ)
def test_what_transformers_writes_is_read(changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    settings = written(hf_config(**changes), tmp_path)
    assert from_hf(settings) == dataclasses.replace(TINY, **{"rope_theta": 50_000.0} | expected)


def test_what_is_left_out_is_what_transformers_takes_for_it() -> None:
    config, theirs = from_hf({"model_type": "qwen3"}), transformers.Qwen3Config()
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    assert (fields.pop("dropout"), fields.pop("rope_theta")) == (0.0, theirs.rope_parameters["rope_theta"])
    assert fields.pop("sliding_window") == 4096  # theirs is null while the window is off
    assert {name: fields.pop(name) for name in YARN_FIELDS} == YARN_FIELDS
    assert fields.pop("rope_type") == theirs.rope_parameters["rope_type"]
    assert fields == {name: getattr(theirs, name) for name in fields}
    windowed = from_hf({"model_type": "qwen3", "use_sliding_window": True})
    assert windowed.sliding_window == transformers.Qwen3Config(use_sliding_window=True).sliding_window


def test_no_number_of_key_value_heads_means_as_many_as_query_heads() -> None:
    settings = {"model_type": "qwen3", "num_attention_heads": 6, "num_key_value_heads": None}
    assert from_hf(settings).num_key_value_heads == 6
    assert transformers.Qwen3Config.from_dict(settings).num_key_value_heads == 6


# The published files, as Transformers 4.51 wrote them.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
OF_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(("flavor", "changes"), [("0.6B", {}), ("8B", OF_8B)])
def test_files_of_transformers_4_are_read(flavor: str, changes: dict[str, Any]) -> None:
    assert from_hf(PUBLISHED | changes) == FLAVORS[flavor]


def test_a_window_in_a_file_of_transformers_4() -> None:
    config = from_hf(PUBLISHED | {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 20})
    assert [config.window(i) for i in (0, 19, 20, 27)] == [None, None, 1024, 1024]


ROPE: dict[str, dict[str, Any]] = {
    "by itself": {"rope_theta": 30_000},
    "by itself, rope_scaling null": {"rope_theta": 30_000, "rope_scaling": None},
    "in rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 30_000.0}},
    "in rope_parameters, without a type": {"rope_parameters": {"rope_theta": 30_000.0}},
    "in both, alike": {"rope_theta": 30_000, "rope_parameters": {"rope_type": "default", "rope_theta": 30_000}},
    "in both, unlike": {"rope_theta": 20_000, "rope_parameters": {"rope_type": "default", "rope_theta": 30_000}},
    "by itself, beside rope_parameters": {"rope_theta": 30_000, "rope_parameters": {"rope_type": "default"}},
    "in an old rope_scaling that scales nothing": {"rope_scaling": {"type": "default", "rope_theta": 30_000}},
    "nowhere": {},
}


@pytest.mark.parametrize("rope", ROPE.values(), ids=ROPE)
def test_the_base_of_the_rotary_embedding_is_the_one_that_transformers_takes(rope: dict[str, Any]) -> None:
    settings = json.dumps({"model_type": "qwen3"} | rope)
    theirs = transformers.Qwen3Config.from_dict(json.loads(settings)).rope_parameters
    assert theirs["rope_type"] == "default"
    assert from_hf(json.loads(settings)).rope_theta == theirs["rope_theta"]


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
OF_YARN: dict[str, Any] = {"rope_type": "yarn", "rope_factor": 4.0, "original_max_position_embeddings": 32768}
YARNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "in rope_parameters": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6} | YARN}, {"rope_theta": 1e6}),
    "old": ({"rope_scaling": {"type": "yarn"} | YARN}, {"rope_theta": 1e4}),
    "not so old": ({"rope_scaling": {"rope_type": "yarn"} | YARN, "rope_theta": 1e6}, {"rope_theta": 1e6}),
    # What one gets by following the model card's advice with a file of Transformers 5. There rope_scaling counts.
    "old beside new": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": {"rope_type": "yarn"} | YARN},
        {"rope_theta": 1e4},
    ),
    "all fields": (
        {"rope_parameters": {"rope_type": "yarn", "attention_factor": 1, "beta_fast": 16, "beta_slow": 2} | YARN},
        {"rope_theta": 1e4, "rope_attention_factor": 1.0, "rope_beta_fast": 16.0, "rope_beta_slow": 2.0},
    ),
    "trained positions left out": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": 4096},
        {"rope_theta": 1e4, "rope_factor": 2.0, "original_max_position_embeddings": 4096},
    ),
    "trained positions beside": (
        {"rope_parameters": {"rope_type": "yarn"} | YARN, "original_max_position_embeddings": 8192},
        {"rope_theta": 1e4},
    ),
}


@pytest.mark.parametrize(("rope", "expected"), YARNS.values(), ids=YARNS)
def test_yarn_is_read_as_transformers_reads_it(rope: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = json.dumps({"model_type": "qwen3"} | rope)
    found = from_hf(json.loads(settings))
    theirs = transformers.Qwen3Config.from_dict(json.loads(settings)).rope_parameters
    positions = {"max_position_embeddings": rope.get("max_position_embeddings", 32_768)}
    assert found == dataclasses.replace(from_hf({"model_type": "qwen3"}), **OF_YARN | positions | expected)
    named = (found.rope_theta, found.rope_factor, found.original_max_position_embeddings)
    assert named == tuple(theirs[name] for name in ("rope_theta", "factor", "original_max_position_embeddings"))


# From ours to Transformers and back

WRITTEN: dict[str, Qwen3Config] = {
    **FLAVORS,
    "untied, bias": dataclasses.replace(TINY, tie_word_embeddings=False, attention_bias=True),
    "other theta and eps": dataclasses.replace(TINY, rope_theta=12_345.0, rms_norm_eps=1e-5, initializer_range=0.05),
    "dropout": dataclasses.replace(TINY, dropout=0.1, attention_dropout=0.2),
    "one key/value head": dataclasses.replace(TINY, num_key_value_heads=1, head_dim=32),
    "window in no layer": dataclasses.replace(TINY, **WINDOW),
    "window in the last layer": dataclasses.replace(TINY, **WINDOW, max_window_layers=1),
    "window in all layers": dataclasses.replace(TINY, **WINDOW, max_window_layers=0),
    "window switched off": dataclasses.replace(TINY, max_window_layers=1),
    "yarn": dataclasses.replace(TINY, **OF_YARN),
    "yarn, all fields": dataclasses.replace(
        TINY, **OF_YARN, rope_beta_fast=16.0, rope_beta_slow=2.0, rope_attention_factor=1.5, rope_truncate=False
    ),
}


@pytest.mark.parametrize("config", WRITTEN.values(), ids=WRITTEN)
def test_there_and_back_is_the_same_but_for_dropout(config: Qwen3Config, tmp_path: Path) -> None:
    theirs = transformers.Qwen3Config(**to_hf(config))
    assert from_hf(written(theirs, tmp_path)) == dataclasses.replace(config, dropout=0.0)


@pytest.mark.parametrize("config", WRITTEN.values(), ids=WRITTEN)
def test_what_is_written_means_the_same_to_transformers(config: Qwen3Config) -> None:
    theirs = transformers.Qwen3Config(**to_hf(config))
    if config.rope_type == "default":
        assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": config.rope_theta}
    with torch.device("meta"):
        layers = transformers.Qwen3ForCausalLM(theirs).model.layers
    assert [layer.self_attn.sliding_window for layer in layers] == [config.window(i) for i in range(len(layers))]


# Windows by layer

FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("types", "first"),
    [
        ([FULL, FULL, SLIDING], 2),
        ([FULL, SLIDING, SLIDING], 1),
        ([SLIDING, SLIDING, SLIDING], 0),
        ([FULL, FULL, FULL], 3),
    ],
    ids=["last", "last two", "all", "none"],
)
@pytest.mark.parametrize("says", [0, 1, 2, 3, 28])
def test_layer_types_decide_and_not_max_window_layers(types: list[str], first: int, says: int) -> None:
    settings = {"model_type": "qwen3", "num_hidden_layers": 3, "max_window_layers": says, "layer_types": types} | WINDOW
    config = from_hf(settings)
    # Where there is no window, a number past the last layer is as good as any other, and stays.
    assert config.max_window_layers == (says if first == 3 and says >= 3 else first)
    with torch.device("meta"):
        small = DIMENSIONS | {key: value for key, value in settings.items() if key != "model_type"}
        layers = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**small)).model.layers
    assert [config.window(i) for i in range(3)] == [layer.self_attn.sliding_window for layer in layers]


def test_layer_types_without_a_window_change_nothing() -> None:
    settings = {"model_type": "qwen3", "num_hidden_layers": 2, "layer_types": [FULL, FULL], "max_window_layers": 1}
    config = from_hf(settings)
    assert config.max_window_layers == 1
    assert [config.window(i) for i in range(2)] == [None, None]


# What is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({"model_type": "llama"}, 'model_type is "llama"; it must be "qwen3"'),
    "qwen2_moe": ({"model_type": "qwen2_moe"}, 'model_type is "qwen2_moe"; it must be "qwen3" or "qwen3_moe"'),
    "qwen2": ({"model_type": "qwen2"}, 'model_type is "qwen2"'),
    "no model type": ({"model_type": None}, "model_type"),
    "yarn of text": (
        {"rope_scaling": {"type": "yarn", "factor": "4"}},
        "rope_scaling: factor must be a number, not '4'",
    ),
    "yarn that shrinks": ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "rope_factor: must be at least 1"),
    "yarn without attention": (
        {"rope_parameters": {"rope_type": "yarn", "attention_factor": 0} | YARN},
        "rope_parameters: attention_factor must be greater than 0",
    ),
    "llama3": ({"rope_parameters": {"rope_type": "llama3"} | YARN}, r'^rope_parameters: .*"llama3"'),
    "linear": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, r'rope_parameters: .*"linear"'),
    "rope by kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        "rope_parameters",
    ),
    "rope_parameters of another kind": ({"rope_parameters": "default"}, "rope_parameters must be an object"),
    "rope_scaling of another kind": ({"rope_scaling": 2.0}, "rope_scaling must be an object, not 2.0"),
    "part of the head rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1"),
    "part of the head rotated, new": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        "partial_rotary_factor is 0.25; only 1",
    ),
    "theta of another kind": ({"rope_theta": "1e6"}, "rope_theta must be a number, not '1e6'"),
    "theta of another kind, new": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": "1e6"}},
        "rope_theta must be a number, not '1e6'",
    ),
    "theta of 0": ({"rope_theta": 0}, "rope_theta: must be greater than 0"),
    "quantized": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        r"quantization_config: quantized weights \(fp8\) are not implemented; use the model's bf16 folder",
    ),
    "quantized somehow": ({"quantization_config": {}}, r"quantization_config: .*\(unknown\)"),
    "quantized in another way": ({"quantization_config": "int4"}, "quantization_config must be an object"),
    "other activation": ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "silu"'),
    "layers mixed": (
        WINDOW | {"num_hidden_layers": 3, "layer_types": [FULL, SLIDING, FULL]},
        "layer_types must be full_attention up to some layer and sliding_attention from there on",
    ),
    "first layer with a window": (WINDOW | {"layer_types": [SLIDING, FULL]}, "layer_types must be full_attention up"),
    "too few layer types": ({"layer_types": [FULL]}, "layer_types must be a list of 2 entries, one per layer"),
    "too many layer types": ({"layer_types": [FULL] * 3}, "layer_types must be a list of 2 entries"),
    "no layer types": ({"layer_types": []}, "layer_types must be a list of 2 entries"),
    "layer types of another kind": ({"layer_types": FULL}, "layer_types must be a list of 2 entries"),
    "unknown layer type": ({"layer_types": [FULL, "linear_attention"]}, "layer_types has linear_attention"),
    "unknown layer type of another kind": ({"layer_types": [FULL, ["x"]]}, "layer_types has "),
    "sliding layers, window off": (
        {"layer_types": [FULL, SLIDING]},
        "layer_types has sliding_attention, but use_sliding_window is false",
    ),
    "window on, but none": (
        WINDOW | {"sliding_window": None},
        "use_sliding_window is true, but sliding_window is null",
    ),
    "window of another kind": (WINDOW | {"sliding_window": "5"}, "sliding_window must be a whole number, not '5'"),
    "text for a number": ({"hidden_size": "64"}, "hidden_size must be a whole number, not '64'"),
    "fraction for a whole number": ({"num_hidden_layers": 2.0}, "num_hidden_layers must be a whole number, not 2.0"),
    "switch for a number": ({"vocab_size": True}, "vocab_size must be a whole number, not True"),
    "list for a number": ({"head_dim": [16]}, r"head_dim must be a whole number, not \[16\]"),
    "text for a fraction": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number, not '1e-6'"),
    "text for a switch": ({"tie_word_embeddings": "true"}, "tie_word_embeddings must be true or false, not 'true'"),
    "number for a switch": ({"attention_bias": 1}, "attention_bias must be true or false, not 1"),
    "text for key/value heads": ({"num_key_value_heads": "4"}, "num_key_value_heads must be a whole number, not '4'"),
    "no tokens": ({"vocab_size": 0}, "vocab_size: must be at least 1, not 0"),
    "heads that cannot be shared": ({"num_key_value_heads": 3}, "num_attention_heads, num_key_value_heads: 8 query"),
    "odd heads": ({"head_dim": 15}, "head_dim: must be even"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_implemented_or_not_right_is_refused(changes: dict[str, Any], message: str) -> None:
    settings = {"model_type": "qwen3"} | DIMENSIONS
    from_hf(settings)  # which is right without the change
    with pytest.raises(ValueError, match=message):
        from_hf(settings | changes)
