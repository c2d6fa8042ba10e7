"""Which ranks share out the experts of a model, and which their shards."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .gloo import one_thread_each
from .world import World


@dataclass(frozen=True)
class ExpertMesh:
    """How experts are laid out: each rank of ``ep`` has some of them, and ``fsdp`` shards those."""

    ep: DeviceMesh
    """Tokens are exchanged in it."""
    fsdp: DeviceMesh
    """Axes (dp_replicate, fsdp), the first only if it has several ranks: the ranks that are left, those of tp included,
    as each of them has tokens of its own."""

    @property
    def ep_group(self) -> dist.ProcessGroup:
        return self.ep.get_group()

    @property
    def shards(self) -> int:
        """Ranks that each expert is sharded over."""
        return self.fsdp.size(self.fsdp.ndim - 1)


@one_thread_each()
def expert_mesh(world: World) -> ExpertMesh | None:
    """The expert mesh of ``world``; None if experts are laid out as all other parameters are. Called by all ranks.

    Axes: pp × dp_replicate × (what ep leaves of dp_shard × cp) × ep × tp, so that ranks that exchange tokens are as
    near to one another as those that gather parameters are.
    """
    layout = world.layout
    if layout.ep == 1 and layout.tp == 1:
        return None
    sizes = (layout.pp, layout.dp_replicate, layout.fsdp // layout.ep, layout.ep, layout.tp)
    mesh = world.everyone._unflatten(0, sizes, ("expert_pp", "expert_dp_replicate", "efsdp", "ep", "expert_tp"))
    shards = mesh["efsdp", "expert_tp"]._flatten("expert_fsdp")
    if layout.dp_replicate > 1:  # along an axis of one rank FSDP would sum gradients, too
        shards = DeviceMesh._concatenate([mesh["expert_dp_replicate"], shards])
    return ExpertMesh(ep=mesh["ep"], fsdp=shards)
