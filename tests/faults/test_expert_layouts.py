"""Runs of a mixture of experts: resumed on other layouts of the experts, and from checkpoints with a damaged expert."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import Command, Runs, records, same_tensors, steps
from torchtitan_style.checkpoint.manifest import problem_of, read_manifest

PP, TP, EP = (f"--parallelism.{axis}_parallel_degree" for axis in ("pipeline", "tensor", "expert"))
MODEL = ["--model.name", "qwen3_moe", "--model.num_hidden_layers", 3, "--model.mlp_only_layers", 1,
         "--model.moe_intermediate_size", 32, "--model.router_aux_loss_coef", 0.1,
         "--optimizer.name", "muon", "--optimizer.muon.normuon_beta2", 0.95,
         "--validation.freq", 2, "--checkpoint.keep_latest_k", 0]  # fmt: skip

LAYOUTS: list[tuple[int, list[object]]] = [
    (2, [PP, 2, "--training.local_batch_size", 2]),
    (4, [EP, 4]),
    (2, [TP, 2]),
    (2, [EP, 2]),
    (1, []),
]
"""Processes and degrees. With tp the experts are sharded over its ranks; else over those that ep leaves."""


def test_a_run_goes_on_however_the_experts_are_laid_out(
    runs: Runs, command: Command, whole: Path, tmp_path: Path
) -> None:
    folder, last = runs.folder("run"), 2 * len(LAYOUTS)
    right = runs("undisturbed", *MODEL, "--training.steps", last).folder
    for number, (nproc, degrees) in enumerate(LAYOUTS):
        loaded, before = tmp_path / f"loaded-{number}", 2 * number
        fault = {"kind": "save_what_was_loaded", "folder": str(loaded)}
        options = [*MODEL, "--training.steps", before + 2, *degrees]
        run = runs(folder, *options, nproc=nproc, faults=[fault])
        if number:
            assert f"resuming after step {before}" in run.output
            same_tensors(loaded, folder / f"checkpoint/step-{before}", tmp_path)
    hashes = records(folder, "batch_hash")
    assert hashes == {step: value for step, value in records(whole, "batch_hash").items() if step <= last}
    for key in ("loss", "aux_loss", "val_loss", "busiest_expert_share", "router_entropy"):
        for step, value in records(right, key).items():
            assert records(folder, key)[step] == pytest.approx(value, rel=1e-5), (key, step)
    assert read_manifest(folder / "checkpoint/step-4").mesh["ep"] == 4

    # A router's weight and an expert's, in files that four ranks have written.
    checkpoint = folder / "checkpoint/step-4"
    for name in ("layers.0.mlp.gate.weight", "layers.2.mlp.experts.down_proj"):
        file, place = place_of(checkpoint, name)
        content = (checkpoint / file).read_bytes()
        (checkpoint / file).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert problem_of(checkpoint) == f"{file} has changed since it was written"
        output = command("torchtitan_style.commands.checkpoint", "verify", checkpoint, status=1)
        assert f"{file} has changed since it was written" in output
        (checkpoint / file).write_bytes(content)
    assert problem_of(checkpoint) is None
    assert max(steps(folder)) == last


def place_of(checkpoint: Path, name: str) -> tuple[str, int]:
    """The file with the last piece of a parameter, and a place among its numbers."""
    metadata: Any = pickle.loads((checkpoint / ".metadata").read_bytes())
    found = [info for index, info in metadata.storage_data.items() if index.fqn.endswith(name)]
    last = max(found, key=lambda info: (info.relative_path, info.offset))
    return last.relative_path, last.offset + last.length // 2
