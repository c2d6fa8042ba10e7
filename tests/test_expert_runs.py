"""Whole runs of Qwen3-MoE: on other layouts on the way, and what they report of their experts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from torchtitan_style.common.errors import UserError
from torchtitan_style.launch.configure import load_config
from torchtitan_style.metrics.experts import ExpertUse

EP, TP = "--parallelism.expert_parallel_degree", "--parallelism.tensor_parallel_degree"


@pytest.fixture
def start(launch, tmp_path: Path):
    """start(folder, steps, nproc, *overrides): run to ``steps``, in fp32."""
    draw = random.Random(0)
    words = ["loss", "gradient", "token", "rank", "mesh", "shard", "step", "weight"]
    (tmp_path / "corpus.txt").write_text(" ".join(draw.choice(words) for _ in range(20_000)))
    config = tmp_path / "config.toml"
    config.write_text(f"""
[model]
name = "qwen3_moe"
flavor = "debug"
num_hidden_layers = 3
mlp_only_layers = [1]
router_aux_loss_coef = 0.01
[data]
dataset = "files"
paths = ["{tmp_path}/corpus.txt"]
[training]
seq_len = 64
global_batch_size = 8
local_batch_size = 2
mixed_precision_param = "float32"
[lr_scheduler]
warmup_steps = 5
total_steps = 30
[validation]
enable = false
[generation]
enable = false
[metrics]
enable_tensorboard = false
""")

    def run(folder: Path, steps: int, nproc: int, *overrides: object):
        arguments = ["--config", config, "--job.dump_folder", folder, "--training.steps", steps, *overrides]
        done = launch(*arguments, nproc=nproc)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def records(folder: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


def test_a_run_goes_on_with_the_same_curve_on_other_layouts(start, tmp_path: Path) -> None:
    done = start(tmp_path / "one", 30, 1)
    assert "0.3 M parameters, 0.2 M of them active" in done.stdout
    start(tmp_path / "many", 10, 4, EP, 4)
    start(tmp_path / "many", 20, 2, TP, 2)
    start(tmp_path / "many", 30, 2, EP, 2)
    one, many = records(tmp_path / "one"), records(tmp_path / "many")
    assert one.keys() == many.keys() == set(range(1, 31))
    assert one[30]["loss"] < one[1]["loss"] - 0.5
    [planned] = [record for record in one.values() if "planned_memory_gib" in record]
    assert 0.35 < planned["planned_memory_gib"] < 0.6  # the libraries are most of it
    for step, right in one.items():
        found = many[step]
        assert found["batch_hash"] == right["batch_hash"]
        # Sums in another order, 1e-7 each, which the steps before pass on.
        assert found["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert found["aux_loss"] == pytest.approx(right["aux_loss"], rel=1e-5)
        assert len(found["busiest_expert_share"]) == len(found["router_entropy"]) == 2
        assert max(found["busiest_expert_share"]) < 1 / 2  # of an expert that every token goes to


def test_experts_that_get_nothing_are_reported_once() -> None:
    said: list[str] = []
    use = ExpertUse(said.append)
    counts = torch.tensor([[6.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    sums = torch.cat((counts, torch.ones(2, 4), torch.zeros(2, 1), torch.full((2, 1), 4.0)), dim=1)
    for step in range(1, 121):
        figures = use.figures(step, sums, sparse_layers=[0, 3], experts_per_token=2)
    assert len(said) == 1
    assert "2 of 4 experts of layer 0 have received no token for 100 steps (2, 3)" in said[0]
    assert figures["busiest_expert_share"] == [0.75, 0.25]
    assert figures["idlest_expert_share"] == [0.0, 0.25]
    assert figures["router_entropy"] == [1.0, 1.0]
    assert figures["aux_loss"] == pytest.approx(4 * 2 * (8 / 8 + 4 / 8 + 2 / 8 + 2 / 8) / 8)


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["--model.num_experts_per_tok", "9"], 1, "cannot be routed to 9 experts where there are 8"),
        (["--model.mlp_only_layers", "0", "1"], 1, "no layer has experts"),
        ([EP, "3"], 3, "3 ranks cannot share the 8 experts"),
        ([EP, "4"], 2, "expert_parallel_degree 4 does not divide the 2 ranks"),
        (["--model.name", "qwen3", EP, "2"], 2, "qwen3 models have no experts"),
    ],
)
def test_bad_configurations(overrides: list[str], world_size: int, message: str) -> None:
    given = ["--model.name", "qwen3_moe", "--model.flavor", "debug", *overrides]
    with pytest.raises(UserError, match=message):
        load_config("train_configs/qwen3.toml", given, world_size=world_size)
