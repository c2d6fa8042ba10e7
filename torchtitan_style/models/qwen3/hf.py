"""Qwen3 in Transformers' format: what ``config.json`` says, and which tensors belong to it.

Parameter names are the same on both sides (``model.py``), so weights need no translation; fields of
the configuration do, here and there. Plain data: nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from torchtitan_style.common.errors import cut, some

from .config import YARN_FIELDS, Qwen3Config

# What Transformers takes a field for that config.json leaves out (its Qwen3Config).
_ABSENT = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32_768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "attention_dropout": 0.0,
}
_ROPE_THETA = 10_000.0


def from_hf(settings: dict[str, Any]) -> Qwen3Config:
    """The dimensions that a ``config.json`` describes.

    Raises ValueError, naming the field, for what is not implemented
    (rope scaling, quantization, another activation), and for values that contradict each other.
    """
    values = common_fields(settings, _ABSENT)
    if values["use_sliding_window"]:
        values["sliding_window"] = field_of(settings, "sliding_window", int, 0, absent=4096)
        if not values["sliding_window"]:
            raise ValueError("use_sliding_window is true, but sliding_window is null")
    return _with_layer_types(Qwen3Config(**values), settings.get("layer_types"))


def common_fields(settings: dict[str, Any], if_absent: dict[str, Any]) -> dict[str, Any]:
    """The fields that Qwen3 and families built on it have in common.

    if_absent: fields to read, with what Transformers takes each for where ``settings`` has none.
    """
    if settings.get("quantization_config") is not None:
        method = field_of(settings, "quantization_config", dict, {}).get("quant_method", "unknown")
        raise ValueError(
            f"quantization_config: quantized weights ({method}) are not implemented; use the model's bf16 folder"
        )
    if (activation := settings.get("hidden_act", "silu")) != "silu":
        raise ValueError(f'hidden_act is "{activation}"; only "silu" is implemented')

    values = {name: field_of(settings, name, type(absent), absent) for name, absent in if_absent.items()}
    heads = values["num_attention_heads"]
    # Null is as many as query heads, left out is the class's default.
    values["num_key_value_heads"] = field_of(
        settings, "num_key_value_heads", int, heads, absent=if_absent["num_key_value_heads"]
    )
    return values | _rope(settings, values["max_position_embeddings"])


def field_of(settings: dict[str, Any], name: str, kind: type, if_null: Any, *, absent: Any = None) -> Any:
    """``settings[name]`` as ``kind``. Raises ValueError if it is something else."""
    if name not in settings and absent is not None:
        return absent
    value = settings.get(name)
    if value is None:
        return if_null
    if kind is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, not {value}")
        return float(value)
    if type(value) is not kind:
        what = {int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}[kind]
        raise ValueError(f"{name} must be {what}, not {cut(repr(value), 120)}")
    return value


def _rope(settings: dict[str, Any], positions: int) -> dict[str, Any]:
    """The fields of the rotary embedding: in ``rope_parameters`` since Transformers 5, in ``rope_scaling`` and by
    themselves before. ``rope_scaling`` counts for more there if both are given.

    positions: max_position_embeddings.
    """
    found: dict[str, Any] = {}
    where, kind = "rope_parameters", "default"
    for name in ("rope_parameters", "rope_scaling"):
        parameters = field_of(settings, name, dict, {})
        if any(isinstance(value, dict) for value in parameters.values()):
            raise ValueError(f"{name}: a different rotary embedding for each kind of layer is not implemented")
        if parameters:
            found, where = parameters, name
            kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in ("default", "yarn"):
            raise ValueError(
                f'{name}: the rope scaling "{cut(str(kind), 120)}" is not implemented; without that entry the model '
                "runs as it was first trained, up to original_max_position_embeddings positions"
            )
    partial = found.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor is {partial}; only 1 (the whole head) is implemented")
    theta = field_of(found, "rope_theta", float, field_of(settings, "rope_theta", float, _ROPE_THETA))
    if kind == "default":
        return {"rope_theta": theta}
    try:
        return {"rope_theta": theta} | _yarn(found, positions)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _yarn(found: dict[str, Any], positions: int) -> dict[str, Any]:
    """What ``found`` says of YaRN, with what Transformers takes for values that are left out."""
    trained = field_of(found, "original_max_position_embeddings", int, positions)
    factor = field_of(found, "factor", float, positions / max(trained, 1))
    attention = field_of(found, "attention_factor", float, 0.0)
    if found.get("attention_factor") is not None and attention <= 0:
        raise ValueError(f"attention_factor must be greater than 0, not {attention}")
    scale, over = (field_of(found, name, float, 0.0) for name in ("mscale", "mscale_all_dim"))
    if not attention and scale and over and factor > 1:
        attention = (0.1 * scale * math.log(factor) + 1.0) / (0.1 * over * math.log(factor) + 1.0)
    return {
        "rope_type": "yarn",
        "rope_factor": factor,
        "original_max_position_embeddings": trained,
        "rope_beta_fast": field_of(found, "beta_fast", float, 0.0) or 32.0,
        "rope_beta_slow": field_of(found, "beta_slow", float, 0.0) or 1.0,
        "rope_attention_factor": attention,
        "rope_truncate": field_of(found, "truncate", bool, True),
    }


def _with_layer_types(config: Qwen3Config, types: Any) -> Qwen3Config:
    """``config`` with the sliding window on the layers that ``layer_types`` names."""
    if types is None:
        return config
    if not isinstance(types, list) or len(types) != config.num_hidden_layers:
        raise ValueError(f"layer_types must be a list of {config.num_hidden_layers} entries, one per layer")
    if unknown := sorted({str(t) for t in types} - {"full_attention", "sliding_attention"}):
        raise ValueError(f"layer_types has {some(unknown)}, which is not implemented")
    sliding = [t == "sliding_attention" for t in types]
    if sliding == [config.window(i) is not None for i in range(len(types))]:
        return config
    if any(sliding) and not config.use_sliding_window:
        raise ValueError("layer_types has sliding_attention, but use_sliding_window is false")
    first = sliding.index(True) if any(sliding) else len(types)
    if not all(sliding[first:]):
        raise ValueError("layer_types must be full_attention up to some layer and sliding_attention from there on")
    return replace(config, max_window_layers=first)


def to_hf(config: Qwen3Config) -> dict[str, Any]:
    """The arguments for ``transformers.Qwen3Config`` that describe ``config``.

    ``dropout`` has no counterpart there; it matters in training only.
    """
    fields = {name: value for name, value in asdict(config).items() if name not in (*YARN_FIELDS, "rope_type")}
    del fields["dropout"]
    yarn = config.yarn
    if yarn is not None:
        fields["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": fields.pop("rope_theta"),
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.trained_positions,
        }
        optional = {
            "beta_fast": "rope_beta_fast",
            "beta_slow": "rope_beta_slow",
            "attention_factor": "rope_attention_factor",
            "truncate": "rope_truncate",
        }
        set_ones = {theirs: getattr(config, ours) for theirs, ours in optional.items()}
        fields["rope_parameters"] |= {
            name: value for name, value in set_ones.items() if value != YARN_FIELDS[optional[name]]
        }
    return fields


def mlp_shapes(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a dense MLP's parameters."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    return {
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
    }


def parameter_shapes(
    config: Qwen3Config, mlp: Callable[[int], dict[str, tuple[int, ...]]] | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters, in the order of the layers; a tied head is not one.

    mlp: layer → those of its MLP; None: a dense one in each.
    """
    hidden = config.hidden_size
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    projections = {
        "q_proj": (query, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, query),
    }
    block: dict[str, tuple[int, ...]] = {}
    for name, shape in projections.items():
        block[f"self_attn.{name}.weight"] = shape
        if config.attention_bias:
            block[f"self_attn.{name}.bias"] = shape[:1]
    block |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    norms: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        layer = block | (mlp_shapes(config) if mlp is None else mlp(i)) | norms
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes
