"""One GPU against the CPU: the same weights, rows, losses; and no waiting for it. Skipped, with a note, where there is
none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ENVIRONMENT, ROOT

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


# Several steps as the loop takes them, with their rows' way to the GPU; the first ones warm up.
STEPS = """
import numpy as np, torch
from torchtitan_style.launch.configure import load_config
from torchtitan_style.config.layout import plan_layout
from torchtitan_style.data.loader import Batch, microbatch
from torchtitan_style.data.rows import Rows
from torchtitan_style.distributed.world import init_world
from torchtitan_style.optim.guard import StepGuard
from torchtitan_style.train.step import build_optimizer, build_training_model, train_step

config = load_config("train_configs/qwen3.toml", [
    "--model.flavor", "debug", "--optimizer.name", "{optimizer}", "--activation_checkpoint.mode", "{recompute}",
    "--training.spike_sigma", "3", *("--optimizer.muon.normuon_beta2 0.95".split() if "{optimizer}" == "muon" else ()),
])
world = init_world(plan_layout(config.parallelism, 1), timeout_seconds=60)
model = build_training_model(config, world, warn=print)
optimizer = build_optimizer(model, config, world)
guard = StepGuard(config.training.spike_sigma, config.training.spike_window, world.device)
ids = np.random.default_rng(0).integers(0, 512, (4, 65))
rows = Rows(ids[:, :-1], ids[:, 1:], np.zeros_like(ids[:, 1:]))

def step(number):
    parts = [microbatch(rows.take(np.arange(at, at + 2)), world.device, document_mask=False) for at in (0, 2)]
    return train_step(model, optimizer, Batch(parts, hash=0), step=number, config=config, world=world, guard=guard)

for number in range(1, 4):
    step(number)
torch.cuda.synchronize()
torch.cuda.set_sync_debug_mode("error")
results = [step(number) for number in range(4, 8)]
torch.cuda.set_sync_debug_mode("default")
assert all(torch.isfinite(result.loss) for result in results)
"""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_training_step_never_waits_for_the_gpu(optimizer: str, recompute: str) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    code = STEPS.format(optimizer=optimizer, recompute=recompute)
    subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": visible},
        cwd=ROOT,
        check=True,
        timeout=300,
    )
