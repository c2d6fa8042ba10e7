"""Qwen3-MoE split over ranks for generating text.

Attention, dense MLPs, embedding and head are split as Qwen3's (Shoeybi et al. 2019, section 3). Each rank has some of
the experts whole. All ranks have all tokens, so none are sent: a rank computes what its experts make of those that are
routed to them, and a sum over the ranks has the results of all experts. Of one token a rank reads the chosen experts
that it has, and no others. On one device the model runs as it is built.

Shapes: N tokens, k experts per token, C hidden size, L experts on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from torchtitan_style.distributed.local import local_tensor
from torchtitan_style.models.qwen3 import inference as qwen3

from .config import Qwen3MoeConfig
from .experts import Experts, grouped_experts
from .model import MoE, Qwen3MoeForCausalLM

replays = False
"""How many rows a rank's experts get is asked of the device, which a recorded step cannot."""


def split_problem(config: Qwen3MoeConfig, ranks: int) -> str | None:
    """Why a model of ``config`` cannot be split over so many ranks, or None if it can."""
    names = ["num_key_value_heads", "vocab_size", "num_experts"]
    if config.num_sparse_layers < config.num_hidden_layers:
        names.append("intermediate_size")
    return qwen3.uneven(config, names, ranks)


def split(model: Qwen3MoeForCausalLM, mesh: DeviceMesh) -> None:
    """Make parameters of ``model``, on the meta device, DTensors over ``mesh``: each rank then loads its own part."""
    qwen3.split(model, mesh)
    for module in model.modules():
        if isinstance(module, Experts):
            for name, parameter in list(module.named_parameters()):
                sharded = distribute_tensor(parameter, mesh, [Shard(0)])
                setattr(module, name, nn.Parameter(sharded, requires_grad=False))


def fuse(model: Qwen3MoeForCausalLM, *, group: dist.ProcessGroup | None = None, compile: bool = False) -> None:
    """Have ``model`` compute on what ``split`` has left this rank of it, in place; nothing without ``group``."""
    if group is None:
        return
    model.requires_grad_(False)
    for layer in model.model.layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                _compute_on_part(module, group if name.endswith(("o_proj", "down_proj")) else None)
        if isinstance(layer.mlp, MoE):
            layer.mlp.experts = _SplitExperts(layer.mlp.experts, group)  # type: ignore[assignment]
    model.lm_head = qwen3.Head(model.lm_head, group, compile)  # type: ignore[assignment]
    model.model.embed_tokens = qwen3.SplitEmbedding(model.model.embed_tokens, group)  # type: ignore[assignment]


def packs(_dtype: torch.dtype, _device: torch.device) -> bool:
    return False


def _compute_on_part(linear: nn.Linear, group: dist.ProcessGroup | None) -> None:
    """group: over which outputs are summed; None: each rank has some of the outputs."""
    for name, parameter in list(linear.named_parameters()):
        setattr(linear, name, nn.Parameter(local_tensor(parameter), requires_grad=False))
    if group is None:
        return
    if linear.bias is not None and dist.get_rank(group) > 0:
        linear.bias.zero_()  # it is added once

    def add_up(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        dist.all_reduce(output, group=group)
        return output

    linear.register_forward_hook(add_up)


class _SplitExperts(nn.Module):
    """``Experts`` of which this rank has the next L."""

    def __init__(self, experts: Experts, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.gate_up_proj = local_tensor(experts.gate_up_proj)  # [L, 2I, C]
        self.down_proj = local_tensor(experts.down_proj)  # [L, C, I]
        self.group = group
        self.first = dist.get_rank(group) * len(self.down_proj)

    def forward(self, x: Tensor, weights: Tensor, order: Tensor, counts: Tensor) -> Tensor:
        """x: [N, C]. weights: [N, k]. order, counts: of ``sort_by_expert``. → [N, C], the same on all ranks"""
        n, k = weights.shape
        last = self.first + len(self.down_proj)
        before, upto = torch.stack((counts[: self.first].sum(), counts[:last].sum())).tolist()
        mine = order[before:upto]  # places in [N, k] of the rows for this rank's experts
        outputs = x.new_zeros(n * k, x.shape[1])
        if len(mine):
            counts = counts[self.first : last]
            if n == 1:
                outputs[mine] = self._one_token(x[0], counts, len(mine))
            else:
                outputs[mine] = grouped_experts(x[mine // k], counts, self.gate_up_proj, self.down_proj)
        y = (weights[..., None] * outputs.view(n, k, -1)).sum(1)
        dist.all_reduce(y, group=self.group)
        return y

    def _one_token(self, x: Tensor, counts: Tensor, chosen: int) -> Tensor:
        """x: [C] → [chosen, C]. Of the weights, no more than the chosen experts' are read."""
        experts = torch.repeat_interleave(counts, output_size=chosen)
        gate, up = (self.gate_up_proj[experts] @ x).chunk(2, dim=-1)  # [chosen, I]
        return (self.down_proj[experts] @ (F.silu(gate) * up)[..., None])[..., 0]
