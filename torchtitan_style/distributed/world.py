"""The process group and the device mesh.

Axes, outermost first: ``pp`` × ``dp_replicate`` × ``dp_shard`` × ``cp`` × ``tp``. Tensor parallelism
communicates most, so its ranks are neighbours. All axes exist in every run, most of them with size 1, so that code
that uses the mesh need not ask which there are.

The same ranks are seen in two ways. Parameters are laid out over (pp, dp_replicate, fsdp, tp), where fsdp is
dp_shard × cp. Tokens are laid out over (dp, cp), where dp is dp_replicate × dp_shard.
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

from torchtitan_style.common.device import backend, current_device
from torchtitan_style.config.layout import Layout, RowPart
from torchtitan_style.cpu.memory import keep_tensors_apart

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
    """What parameters are laid out over: axes ("pp", "dp_replicate", "fsdp", "tp")."""
    dp_rank: int
    """Which of the data-parallel shares of the rows this rank takes."""
    part: RowPart
    """Which positions of those rows."""
    dp_group: dist.ProcessGroup
    """The ranks that see other rows than this one, and the same slice of everything else."""
    cp_group: dist.ProcessGroup
    """The ranks that see other positions of the same rows, and the same slice of everything else."""
    batch_group: dist.ProcessGroup
    """The ranks whose tokens add up to the global batch: dp × cp."""
    result_group: dist.ProcessGroup
    """The ranks that each have a share of the loss of the global batch: dp × cp of all pipeline stages, of which only
    the last has any loss."""
    stage_group: dist.ProcessGroup
    """All ranks of this pipeline stage."""
    everyone: DeviceMesh
    """All ranks, as the mesh that all others are views of."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that talks to the user and writes shared files."""
        return self.rank == 0

    @property
    def pp_group(self) -> dist.ProcessGroup:
        """The ranks that pass the same rows on, one of each pipeline stage."""
        return self.mesh["pp"].get_group()

    @property
    def stage(self) -> int:
        """This rank's place on the pp axis."""
        return self.mesh["pp"].get_local_rank()

    @property
    def counts(self) -> bool:
        """Whether what this rank adds up over its tokens counts: of the tp ranks, which hold the same, the first."""
        return self.mesh["tp"].get_local_rank() == 0


@one_thread_each()
def init_world(layout: Layout, *, timeout_seconds: int) -> World:
    """Join the other processes (torchrun's environment, or none: a group of one) and lay the mesh.

    timeout_seconds: how long the watchdog waits; see there.
    """
    device = current_device()
    keep_tensors_apart(device)
    timeout = timedelta(seconds=timeout_seconds + _SLACK)
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # the older name of the same
        # Of the last 2,000 collectives, which torch remembers by default, the watchdog needs one.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "16")
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(backend(device), timeout=timeout)
        else:
            store = dist.HashStore()
            dist.init_process_group(backend(device), store=store, rank=0, world_size=1, timeout=timeout)
    if dist.get_world_size() != layout.world_size:
        raise ValueError(f"layout {layout} does not fit {dist.get_world_size()} processes")
    everyone = init_device_mesh(device.type, (layout.world_size,), mesh_dim_names=("world",))
    parameters = _axes(everyone, pp=layout.pp, dp_replicate=layout.dp_replicate, fsdp=layout.fsdp, tp=layout.tp)
    tokens = _axes(everyone, pp=layout.pp, dp=layout.dp, cp=layout.cp, tp=layout.tp)
    return World(
        rank=dist.get_rank(),
        layout=layout,
        device=device,
        mesh=parameters,
        dp_rank=tokens["dp"].get_local_rank(),
        part=RowPart(tokens["cp"].get_local_rank(), layout.cp),
        dp_group=tokens["dp"].get_group(),
        cp_group=tokens["cp"].get_group(),
        batch_group=_together(tokens, "dp", "cp"),
        result_group=_together(tokens, "pp", "dp", "cp"),
        stage_group=_together(parameters, "dp_replicate", "fsdp", "tp"),
        everyone=everyone,
    )


def _axes(everyone: DeviceMesh, **sizes: int) -> DeviceMesh:
    """All ranks, seen along these axes. Meshes must come from one to be combined."""
    return everyone._unflatten(0, tuple(sizes.values()), tuple(sizes))


def _together(mesh: DeviceMesh, *axes: str) -> dist.ProcessGroup:
    """The group of all ranks that differ from this one along ``axes`` only."""
    wide = [axis for axis in axes if mesh[axis].size() > 1]
    if len(wide) <= 1:
        return mesh[wide[0] if wide else axes[0]].get_group()
    if mesh[axes].size() == dist.get_world_size() and dist.group.WORLD is not None:
        return dist.group.WORLD
    return mesh[axes]._flatten("_".join(axes)).get_group()


def set_timeout(seconds: int) -> None:
    """Change how long the watchdog waits, and so a collective may take, in all groups made so far."""
    from torch.distributed import distributed_c10d

    # Public since torch 2.14, where the private one warns.
    set_of_group = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in distributed_c10d._world.pg_map.keys() - _patient:
        set_of_group(timedelta(seconds=seconds + _SLACK), group)


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
