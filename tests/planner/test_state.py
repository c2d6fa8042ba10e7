"""Weights, gradients and optimizer state of each rank: the arithmetic, the layout on meta, and real ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchtitan_style.config import Config
from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import Layout
from torchtitan_style.launch.configure import load_config
from torchtitan_style.planner.laid_out import lay_out, state_held
from torchtitan_style.planner.parameters import parameter_kinds, state_of

# 67 and 45 rows divide by nothing here: FSDP's chunks differ in length, and some ranks hold nothing.
TINY = ("--model.flavor", "debug", "--model.hidden_size", "67", "--model.intermediate_size", "90",
        "--model.vocab_size", "302", "--model.head_dim", "6",
        "--training.local_batch_size", "1", "--training.global_batch_size", "-1")  # fmt: skip
MUON = ("--optimizer.name", "muon")
NORMUON = (*MUON, "--optimizer.muon.normuon_beta2", "0.95")
UNTIED = ("--model.tie_word_embeddings", "false")
BIASED = ("--model.attention_bias", "true")
FULL = ("--activation_checkpoint.mode", "full")

EXPERTS = ("--model.name", "qwen3_moe", "--model.hidden_size", "72")

LORA = ("--lora.rank", "3")
TARGETS = ("--lora.target_modules", "layers.0.*", "o_proj", "mlp.*")

CASES: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "one": ({}, ()),
    "one, muon, recomputed": ({}, (*MUON, *FULL)),
    "dp 4": ({"dp_shard": 4}, ()),
    "dp 4, untied": ({"dp_shard": 4}, UNTIED),
    "dp 4, muon": ({"dp_shard": 4}, MUON),
    "replicated 4": ({"dp_replicate": 4}, MUON),
    "hybrid 2 × 2": ({"dp_replicate": 2, "dp_shard": 2}, BIASED),
    "hybrid 2 × 2, normuon, untied": ({"dp_replicate": 2, "dp_shard": 2}, (*NORMUON, *UNTIED)),
    "tp 2": ({"tp": 2}, ()),
    "tp 2, untied, biased, muon": ({"tp": 2}, (*UNTIED, *BIASED, *MUON)),
    "dp 2 × tp 2": ({"dp_shard": 2, "tp": 2}, MUON),
    "dp 2 × tp 2, normuon": ({"dp_shard": 2, "tp": 2}, NORMUON),
    "dp 2 × tp 2, untied, biased": ({"dp_shard": 2, "tp": 2}, (*UNTIED, *BIASED)),
    "replicated 2 × tp 2": ({"dp_replicate": 2, "tp": 2}, ()),
    "one, adapters": ({}, LORA),
    "dp 4, adapters": ({"dp_shard": 4}, (*LORA, "--training.mixed_precision_param", "float32")),
    "dp 2 × tp 2, some adapters, muon": ({"dp_shard": 2, "tp": 2}, (*LORA, *TARGETS, *MUON)),
    # Experts are shared out over ep. The ranks that ep leaves cut between the experts of a rank or, where their number
    # does not divide them, within each (3 experts over 2 ranks).
    "experts, one": ({}, EXPERTS),
    "experts, dp 4": ({"dp_shard": 4}, (*EXPERTS, *MUON)),
    "experts, ep 2": ({"dp_shard": 2, "ep": 2}, (*EXPERTS, *MUON)),
    "experts, ep 4": ({"dp_shard": 4, "ep": 4}, EXPERTS),
    "experts, dp 4 × ep 2": ({"dp_shard": 4, "ep": 2}, (*EXPERTS, *MUON)),
    "experts, dp 4 × ep 2, cut within": ({"dp_shard": 4, "ep": 2}, (*EXPERTS, *NORMUON, "--model.num_experts", "6")),
    "experts, tp 2 × ep 2": ({"dp_shard": 2, "tp": 2, "ep": 2}, (*EXPERTS, *NORMUON)),
    "experts, tp 2, dense layers": ({"tp": 2}, (*EXPERTS, "--model.mlp_only_layers", "0")),
    "experts, hybrid 2 × 2, ep 2": ({"dp_replicate": 2, "dp_shard": 2, "ep": 2}, (*EXPERTS, *MUON)),
    "experts, cp 2 × ep 2": ({"cp": 2, "ep": 2}, EXPERTS),
    "tp 2, frozen": ({"tp": 2}, ("--training.freeze", "*embed_tokens*", "model.layers.0.*")),
}


def parts(name: str) -> tuple[Config, Layout]:
    degrees, overrides = CASES[name]
    layout = Layout(**degrees)
    return load_config(DEFAULT_CONFIG, given(overrides, layout), world_size=layout.world_size), layout


def given(overrides: tuple[str, ...], layout: Layout) -> list[str]:
    return [*TINY, *overrides, "--parallelism.tensor_parallel_degree", str(layout.tp),
            "--parallelism.data_parallel_replicate_degree", str(layout.dp_replicate),
            "--parallelism.context_parallel_degree", str(layout.cp),
            "--parallelism.expert_parallel_degree", str(layout.ep)]  # fmt: skip


@pytest.fixture(scope="module")
def real(run_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Of each case what each rank really holds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for world_size in (1, 2, 4):
        names = [name for name in CASES if Layout(**CASES[name][0]).world_size == world_size]
        folder = tmp_path_factory.mktemp("state")
        cases = []
        for name in names:
            overrides = given(CASES[name][1], Layout(**CASES[name][0]))
            cases.append({"layout": CASES[name][0], "overrides": overrides})
        (folder / "cases").write_text(json.dumps(cases), encoding="utf-8")
        run_ranks(Path(__file__).with_name("state_of_ranks.py"), world_size, folder / "cases", folder)
        ranks = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world_size)]
        found |= {name: [rank[i] for rank in ranks] for i, name in enumerate(names)}
    return found


@pytest.mark.parametrize("name", CASES)
def test_state_is_that_of_real_ranks_to_the_byte(real: dict[str, list[dict[str, Any]]], name: str) -> None:
    config, layout = parts(name)
    kinds = parameter_kinds(config)
    for rank, actual in enumerate(real[name]):
        held = lay_out(config, layout, rank)
        assert {key: list(each.local) for key, each in held.items()} == actual["local"]
        on_meta = state_held(held)
        by_arithmetic = state_of(kinds, layout, rank)
        assert on_meta == by_arithmetic
        assert (on_meta.weights, on_meta.optimizer) == (actual["weights"], actual["optimizer"])
        assert on_meta.gradients == actual["gradients"]


@pytest.mark.parametrize(("flavor", "layout"), [
    ("0.6B", Layout(dp_shard=24)),
    ("8B", Layout(dp_replicate=16, dp_shard=8, tp=8)),
    ("30B-A3B", Layout(dp_replicate=2, dp_shard=24, tp=2, ep=8)),
])  # fmt: skip
def test_arithmetic_is_that_of_the_layout_on_many_ranks(flavor: str, layout: Layout) -> None:
    overrides = ["--model.flavor", flavor, "--optimizer.name", "muon", "--training.global_batch_size", "-1",
                 "--model.num_hidden_layers", "3", "--training.local_batch_size", "1"]  # fmt: skip
    if flavor == "30B-A3B":
        overrides += ["--model.name", "qwen3_moe"]
    config = load_config(DEFAULT_CONFIG, overrides, world_size=layout.world_size)
    last = layout.world_size - 1
    for rank in (0, last):
        assert state_held(lay_out(config, layout, rank)) == state_of(parameter_kinds(config), layout, rank)
