"""Whole runs with Muon: on another layout half-way, and from or to another optimizer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def start(launch, tmp_path_factory):
    """start(folder, steps, nproc, *overrides): run to ``steps``, in fp32."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    words = ["loss", "gradient", "token", "rank", "mesh", "shard", "step", "weight"]
    (folder / "corpus.txt").write_text(" ".join(draw.choice(words) for _ in range(20_000)))
    config = folder / "config.toml"
    config.write_text(f"""
[model]
flavor = "debug"
[data]
dataset = "files"
paths = ["{folder}/corpus.txt"]
[training]
seq_len = 64
global_batch_size = 8
local_batch_size = -1
mixed_precision_param = "float32"
[optimizer]
name = "muon"
lr = 1e-3
[optimizer.muon]
lr = 2e-3
[lr_scheduler]
warmup_steps = 5
total_steps = 20
[validation]
enable = false
[generation]
enable = false
[metrics]
enable_tensorboard = false
""")

    def run(folder: Path, steps: int, nproc: int, *overrides: object):
        arguments = ["--config", config, "--job.dump_folder", folder, "--training.steps", steps, *overrides]
        return launch(*arguments, nproc=nproc)

    return run


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["lr_muon"] == pytest.approx(2 * line["lr"]) for line in lines)
    return {line["step"]: line["loss"] for line in lines}


def test_a_run_goes_on_with_the_same_curve_on_other_layouts(start, tmp_path: Path) -> None:
    """NorMuon, which has all that Muon has and a number for each row."""
    tp, copies = "--parallelism.tensor_parallel_degree", "--parallelism.data_parallel_replicate_degree"
    for name, steps, nproc, *layout in (
        ("one", 14, 1),
        ("many", 5, 4, tp, 2),
        ("many", 10, 1),
        ("many", 14, 2, copies, 2),
    ):
        done = start(tmp_path / name, steps, nproc, *layout, "--optimizer.muon.normuon_beta2", 0.95)
        assert done.returncode == 0, done.stdout + done.stderr
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert one.keys() == many.keys() == set(range(1, 15))
    assert one[14] < one[1] - 1
    # Orthogonalising lifts the weakest directions, and with them the rounding of sums in another order.
    assert max(abs(one[step] - many[step]) / one[step] for step in one) < 1e-5


def test_another_optimizer_is_refused_unless_asked_for(start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(run, 4, 1).returncode == 0
    adamw = ["--optimizer.name", "adamw", "--optimizer.muon.lr", 2e-3]
    config = (run / "config.toml").read_text()
    refused = start(run, 8, 1, *adamw)
    assert refused.returncode == 2  # Muon's settings would not apply
    assert "is only read with" in refused.stderr
    (tmp_path / "adamw.toml").write_text(
        "\n".join(
            line for line in config.replace('name = "muon"', 'name = "adamw"').splitlines() if line != "lr = 0.002"
        )
    )
    again = ["--config", tmp_path / "adamw.toml"]
    refused = start(run, 8, 1, *again)
    assert refused.returncode == 2
    assert "optimizer.name was muon, is adamw" in refused.stderr
    assert "checkpoint.switch_optimizer" in refused.stderr
    done = start(run, 8, 1, *again, "--checkpoint.switch_optimizer", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the optimizer was muon; adamw starts afresh" in done.stdout + done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [("lr_muon" in line) for line in lines] == [True] * 4 + [False] * 4
    # Not again once it has been switched.
    done = start(run, 10, 1, *again, "--checkpoint.switch_optimizer", "true")
    assert done.returncode == 0
    assert "starts afresh" not in done.stdout + done.stderr
