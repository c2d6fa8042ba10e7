"""LoRA: low-rank adapters beside linear layers (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models").

y = W·x + alpha/rank · B·A·x, where W stays as it is and A [rank, in] and B [out, rank] are trained. B starts at zero,
so that the model starts as it was.

Under tensor parallelism A and B are cut as W is: the factor that has the dimension that is split is split, the other is
whole on each rank. No activation is sent that W does not send: a sum over ranks of B·A·x is part of that of W·x.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from torchtitan_style.common.errors import UserError
from torchtitan_style.config.schema import Lora

from .trained import DOWN, UP


class LoRALinear(nn.Linear):
    """A linear layer with an adapter. ``add_adapters`` makes them of others."""

    lora_A: nn.Linear
    lora_B: nn.Linear
    lora_dropout: float
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] → [..., out]"""
        y = super().forward(x)
        down, up = self.lora_A.weight, self.lora_B.weight
        if not isinstance(y, DTensor):
            return y + self._adapter(x, down, up)
        assert isinstance(x, DTensor)
        assert isinstance(down, DTensor)
        assert isinstance(up, DTensor)
        # On what the rank holds: some of the outputs, or a part of the sum that all of them are.
        part = self._adapter(*(_local_with_sum(tensor) for tensor in (x, down, up)))
        placements = [Partial() if placement.is_replicate() else Shard(x.ndim - 1) for placement in up.placements]
        return y + DTensor.from_local(part, y.device_mesh, placements, run_check=False)

    def _adapter(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        x = F.dropout(x, self.lora_dropout, self.training)
        return F.linear(F.linear(x, down), up) * self.lora_scale


def _local_with_sum(tensor: DTensor) -> Tensor:
    """What a rank holds. The gradient of what is whole on each rank is a sum over the ranks."""
    placements = [Partial() if placement.is_replicate() else placement for placement in tensor.placements]
    return tensor.to_local(grad_placements=placements)


def add_adapters(model: nn.Module, lora: Lora, modules: Collection[str]) -> None:
    """Give the linear layers ``modules`` of ``model``, by name, adapters in fp32, in place and without values.

    Those that another stage of a pipeline has are passed over.
    """
    for name, module in model.named_modules():
        if name in modules:
            if type(module) is not nn.Linear:
                raise UserError(
                    f"lora.target_modules: {name} is a {type(module).__name__}; only torch.nn.Linear can be adapted"
                )
            _add_adapter(module, lora)


def _add_adapter(linear: nn.Linear, lora: Lora) -> None:
    # In place: tensor parallelism has put its hooks on the module.
    linear.__class__ = LoRALinear
    assert isinstance(linear, LoRALinear)
    rows, columns, device = linear.out_features, linear.in_features, linear.weight.device
    linear.lora_A = nn.Linear(columns, lora.rank, bias=False, device=device, dtype=torch.float32)
    linear.lora_B = nn.Linear(lora.rank, rows, bias=False, device=device, dtype=torch.float32)
    linear.lora_dropout, linear.lora_scale = lora.dropout, lora.scale
    if isinstance(linear.weight, DTensor):
        mesh, placements = linear.weight.device_mesh, linear.weight.placements
        for factor, kept in ((linear.lora_A, 1), (linear.lora_B, 0)):
            cut = [_if_of(placement, kept) for placement in placements]
            factor.weight = nn.Parameter(distribute_tensor(factor.weight.detach(), mesh, cut))


def _if_of(placement: Placement, dim: int) -> Placement:
    """``placement`` of a matrix for its factor that has its dimension ``dim``."""
    return placement if isinstance(placement, Shard) and placement.dim == dim else Replicate()


def initial_std(model: Any, *, of_base: Callable[[str], float | None] | None = None) -> Callable[[str], float | None]:
    """As ``initial_std`` of ``model``, for a model with adapters: A has the variance of PEFT's (Kaiming's uniform
    distribution with a = √5), B is zero. of_base: for all other parameters, instead of the model's own."""
    of_others = of_base or model.initial_std
    widths = {name: p.shape[1] for name, p in model.named_parameters() if name.endswith(DOWN)}

    def std(name: str) -> float | None:
        if name.endswith(UP):
            return 0.0
        return (3 * widths[name]) ** -0.5 if name in widths else of_others(name)

    return std
