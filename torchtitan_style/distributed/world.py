"""The process group and the device mesh.

Mesh axes, outermost first: ``dp_replicate`` × ``dp_shard`` × ``tp``. Tensor parallelism talks
most, so its ranks are neighbours. All axes exist in every run, most of them with size 1: one
process takes the same path through the code as a thousand.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan_style.config.layout import Layout

from .device import backend, current_device, keep_tensors_apart
from .gloo import one_thread_each

__all__ = ["World", "destroy_world", "init_world", "on_main", "patient_group", "set_timeout"]

T = TypeVar("T")

_patient: set[dist.ProcessGroup] = set()
"""Groups whose timeout stays as it is."""

_SLACK = 60
"""Seconds that torch waits longer than the watchdog, which can tell for whom."""


@dataclass(frozen=True)
class World:
    """Where this process stands among all."""

    rank: int
    layout: Layout
    device: torch.device
    mesh: DeviceMesh
    dp_rank: int
    dp_group: dist.ProcessGroup
    """The ranks that see other rows than this one and hold the same slice of the sequence."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that talks to the user and writes shared files."""
        return self.rank == 0


@one_thread_each()
def init_world(layout: Layout, *, timeout_seconds: int) -> World:
    """Join the other processes (torchrun's environment, or none: a group of one) and lay the mesh.

    timeout_seconds: how long the watchdog waits; see there.
    """
    device = current_device()
    keep_tensors_apart(device)
    timeout = timedelta(seconds=timeout_seconds + _SLACK)
    if device.type == "cpu":  # have gloo remember the last collectives for the watchdog, as NCCL does by itself
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "16")
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(backend(device), timeout=timeout)
        else:
            store = dist.HashStore()
            dist.init_process_group(backend(device), store=store, rank=0, world_size=1, timeout=timeout)
    if dist.get_world_size() != layout.world_size:
        raise ValueError(f"layout {layout} does not fit {dist.get_world_size()} processes")
    mesh = init_device_mesh(
        device.type,
        (layout.dp_replicate, layout.dp_shard, layout.tp),
        mesh_dim_names=("dp_replicate", "dp_shard", "tp"),
    )
    dp_mesh = mesh["dp_replicate", "dp_shard"]._flatten("dp")
    return World(
        rank=dist.get_rank(),
        layout=layout,
        device=device,
        mesh=mesh,
        dp_rank=dp_mesh.get_local_rank(),
        dp_group=dp_mesh.get_group(),
    )


def set_timeout(seconds: int) -> None:
    """Change how long the watchdog waits, and so a collective may take, in all groups made so far."""
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    for group in _world.pg_map.keys() - _patient:
        _set_pg_timeout(timedelta(seconds=seconds + _SLACK), group)


@one_thread_each()
def patient_group() -> dist.ProcessGroup:
    """A group of all ranks in which they may wait for hours, for what takes some of them longer than the others."""
    group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
    _patient.add(group)
    return group


def on_main(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run ``action`` on rank 0 while the others wait; all return its result, or raise what it raised.

    group: of all ranks, to tell them by; None: the default one, which the main thread alone may use.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def destroy_world() -> None:
    """Leave the process group, if in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
