"""One GPU against the CPU: the same weights, rows, losses. Skipped, with a note, where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ENVIRONMENT

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_gpu_has_the_curve_of_the_cpu(tmp_path, compiled: str) -> None:
    for device, visible in (("cpu", ""), ("cuda", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])):
        command = [
            sys.executable, "-m", "torchtitan_style", "train", "--job.dump_folder", str(tmp_path / device),
            "--model.flavor", "debug", "--model.vocab_size", "4096", "--training.steps", "20",
            "--training.mixed_precision_param", "float32", "--compile.enable", compiled, "--debug.deterministic",
        ]  # fmt: skip
        subprocess.run(command, env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": visible}, check=True, timeout=500)
    # Other kernels sum in another order: 1e-6 a step, growing.
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)
