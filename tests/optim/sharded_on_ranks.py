"""Run by test_sharded.py as ranks: sharded Muon and AdamW against the same in one piece, bit for bit.

Arguments: output.json. Matrices are sharded in every way, among them shapes that do not divide evenly and
ranks that hold nothing.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from torchtitan_style.config.schema import Muon, Optimizer
from torchtitan_style.distributed.gloo import one_thread_each
from torchtitan_style.distributed.local import local_part
from torchtitan_style.optim import exchange, muon
from torchtitan_style.optim.adamw import adamw, step_if
from torchtitan_style.train.stopping import ending_at_once

SHAPES = [(16, 16), (24, 8), (8, 40), (7, 5), (3, 10), (33, 12), (2, 2)]
SOUND = torch.tensor(True)
STEPS = 3


def placements() -> dict[str, tuple[tuple[int, ...], list[Placement]]]:
    """Meshes of all ranks."""
    world = dist.get_world_size()
    found: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
        "rows": ((world,), [Shard(0)]),
        "columns": ((world,), [Shard(1)]),
    }
    if world == 4:
        found["rows × columns"] = ((2, 2), [Shard(0), Shard(1)])
        found["rows × rows"] = ((2, 2), [Shard(0), Shard(0)])
        found["copies × rows"] = ((2, 2), [Replicate(), Shard(0)])
    return found


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


mesh_of = functools.cache(functools.partial(init_device_mesh, "cpu"))
"""Making groups takes longer than all else."""


def compare(shape: tuple[int, ...], how: list[Placement], dtype: torch.dtype, config: Muon) -> dict[str, float]:
    mesh = mesh_of(shape)
    torch.manual_seed(0)
    start = [0.1 * torch.randn(s) for s in SHAPES]
    whole = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    sharded = [torch.nn.Parameter(distribute_tensor(tensor, mesh, how)) for tensor in start]
    with patch.object(muon, "_ranks", lambda group: 1):
        dense = muon.Muon(whole, config, lr=0.02, weight_decay=0.1, dtype=dtype)
    optimizer = muon.Muon(sharded, config, lr=0.02, weight_decay=0.1, dtype=dtype)

    done = []
    real = muon.orthogonalize
    for step in range(STEPS):
        for a, b, gradient in zip(whole, sharded, gradients(step), strict=True):
            a.grad, b.grad = gradient.clone(), distribute_tensor(gradient, mesh, how)
        dense.step_if(SOUND)
        with patch.object(muon, "orthogonalize", lambda m, **how: done.append(m.shape) or real(m, **how)):
            optimizer.step_if(SOUND)
    weights = max((a - b.full_tensor()).abs().max().item() for a, b in zip(whole, sharded, strict=True))
    parts = [
        (value, *local_part(optimizer.state[b][name]))
        for a, b in zip(whole, sharded, strict=True)
        for name, value in dense.state[a].items()
    ]
    # Of each rank by itself: copies must not differ.
    state = torch.stack([(value[where] - part).abs().max() for value, part, where in parts if part.numel()]).max()
    dist.all_reduce(state, dist.ReduceOp.MAX)
    count = torch.tensor(len(done))
    dist.all_reduce(count)
    found = {"weights": weights, "state": state.item(), "orthogonalized": count.item()}
    return found | {"adamw": compare_adamw(start, mesh, how)}


def compare_adamw(start: list[torch.Tensor], mesh: DeviceMesh, how: list[Placement]) -> float:
    whole = {str(i): torch.nn.Parameter(tensor.clone()) for i, tensor in enumerate(start)}
    sharded = {str(i): torch.nn.Parameter(distribute_tensor(tensor, mesh, how)) for i, tensor in enumerate(start)}
    optimizers = [adamw(parameters, Optimizer(lr=0.01)) for parameters in (whole, sharded)]
    for step in range(STEPS):
        for a, b, gradient in zip(whole.values(), sharded.values(), gradients(step), strict=True):
            a.grad, b.grad = gradient.clone(), distribute_tensor(gradient, mesh, how)
        for optimizer in optimizers:
            step_if(optimizer, SOUND)
    return max((whole[n] - sharded[n].full_tensor()).abs().max().item() for n in whole)


@one_thread_each()
def main() -> None:
    dist.init_process_group("gloo")
    found = {}
    for name, (shape, how) in placements().items():
        for dtype in (torch.float32, torch.bfloat16):
            for most in (1, 300, 2**24):  # a matrix a rank and round, a few, all
                with patch.object(exchange, "OWNED_ELEMENTS", most):
                    found[f"{name}, {dtype}, {most}"] = compare(shape, how, dtype, Muon())
                    if most == 300:
                        found[f"{name}, {dtype}, NorMuon"] = compare(shape, how, dtype, Muon(normuon_beta2=0.9))
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    with ending_at_once():
        main()
