"""Qwen3-MoE on a mesh: Qwen3's layout, and that of the experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from torchtitan_style.common.sizes import expert_shard_dim
from torchtitan_style.distributed.experts import ExpertMesh
from torchtitan_style.distributed.recompute import keep_outputs_of
from torchtitan_style.distributed.tensor import NormOfShard
from torchtitan_style.models.qwen3.model import DecoderLayer
from torchtitan_style.models.qwen3.parallelize import dense_mlp_plan, parallelize_qwen3

from .expert_parallel import expert_parallel
from .experts import Experts
from .model import MoE, Qwen3MoeForCausalLM


def parallelize_qwen3_moe(
    model: Qwen3MoeForCausalLM, mesh: DeviceMesh, *, expert_mesh: ExpertMesh | None, **options: Any
) -> None:
    """Lay ``model`` (best on the meta device) out over ``mesh``, in place.

    expert_mesh: that of the experts; None: they are laid out as all else is. options: of ``parallelize_qwen3``.

    Under tensor parallelism each rank has its own positions between blocks (sequence parallelism). It keeps them
    where there are experts: there it routes them as a data-parallel rank would, so that no expert is cut into slices
    that are too narrow to multiply with, and the experts are sharded over the tp ranks, too.
    """
    keep_outputs_of(torch.ops.aten._grouped_mm.default, torch.ops.torchtitan_style.grouped_linear.default)
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    shards = mesh["fsdp"].size()
    if expert_mesh is not None:
        shards = expert_mesh.shards
        if expert_mesh.ep.size() > 1:
            for module in experts:
                _share_out(module, expert_mesh)
    parallelize_qwen3(
        model,
        mesh,
        mlp_plan=_mlp_plan,
        placement=lambda parameter: _cut(parameter, shards, 1 if expert_mesh is None else expert_mesh.ep.size()),
        apart={} if expert_mesh is None else dict.fromkeys(experts, expert_mesh.fsdp),
        **options,
    )


def _share_out(experts: Experts, mesh: ExpertMesh) -> None:
    """Give each rank of ``mesh.ep`` its experts, and have tokens sent to them."""
    for name, parameter in experts.named_parameters():
        mine = distribute_tensor(parameter, mesh.ep, [Shard(0)])
        setattr(experts, name, nn.Parameter(mine, requires_grad=parameter.requires_grad))
    experts.run = expert_parallel(experts.run, mesh.ep_group)


def _cut(parameter: nn.Parameter, shards: int, ep: int) -> Shard | None:
    """Along which dimension to shard; None: by rows, as all but stacked experts are."""
    if parameter.ndim < 3:
        return None
    return Shard(expert_shard_dim(tuple(parameter.shape), ep=ep, shards=shards))


def _mlp_plan(layer: DecoderLayer) -> dict[str, ParallelStyle]:
    # The router's weight is the same on all tp ranks, and each finds the part of its gradient from its own positions.
    return {"mlp.gate": NormOfShard()} if isinstance(layer.mlp, MoE) else dense_mlp_plan(layer)
