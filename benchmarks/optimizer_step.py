"""Time of the optimizer's step alone: AdamW and Muon, on 1, 2 and 4 processes of one thread each.

    python benchmarks/optimizer_step.py

The default model, sharded by FSDP2; gradients are made up. Medians over alternating repeats, and as many
processes at once as there are cores at most, so that time on 4 processes of 2 cores is not a speed-up.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_style.config import Config
from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import plan_layout
from torchtitan_style.distributed.world import init_world
from torchtitan_style.launch.configure import load_config
from torchtitan_style.train.step import build_optimizer, build_training_model

REPEATS = 15


def measure() -> None:
    """As one rank: print the median milliseconds of both optimizers."""
    torch.set_num_threads(1)
    world_size = int(os.environ["WORLD_SIZE"])
    times: dict[str, list[float]] = {"adamw": [], "muon": []}
    steps = {}
    for name in times:
        config: Config = load_config(DEFAULT_CONFIG, ["--optimizer.name", name], world_size=world_size)
        world = init_world(plan_layout(config.parallelism, world_size), timeout_seconds=300)
        model = build_training_model(config, world, warn=print)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer = build_optimizer(model, config, world)
        steps[name] = optimizer.step_if
    sent = 0
    real = dist.all_to_all_single

    def counting(output: Tensor, given: Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal sent
        sent += given.nbytes
        return real(output, given, *arguments, **options)

    sound = torch.tensor(True)
    with mock.patch.object(dist, "all_to_all_single", counting):
        for _ in range(REPEATS):
            for name, step in steps.items():
                dist.barrier()
                start = time.perf_counter()
                step(sound)
                dist.barrier()
                times[name].append(1000 * (time.perf_counter() - start))
    if world.is_main:
        found = {name: statistics.median(values) for name, values in times.items()}
        print(json.dumps(found | {"MiB": sent / REPEATS / 2**20}), flush=True)
    os._exit(0)


def on(world_size: int) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--rank"]
        ranks.append(subprocess.Popen(command, env=os.environ | address | own, stdout=subprocess.PIPE, text=True))
    outputs = [rank.communicate()[0] for rank in ranks]
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    print(f"milliseconds of one optimizer step, default model, medians of {REPEATS}, {os.cpu_count()} cores")
    print(f"{'processes':>9}  {'AdamW':>7}  {'Muon':>7}  {'Muon / AdamW':>12}  {'MiB sent a rank':>15}")
    for world_size in (1, 2, 4):
        found = on(world_size)
        ratio = found["muon"] / found["adamw"]
        print(f"{world_size:>9}  {found['adamw']:>7.1f}  {found['muon']:>7.1f}  {ratio:>12.1f}  {found['MiB']:>15.2f}")


if __name__ == "__main__":
    measure() if sys.argv[1:] == ["--rank"] else main()
