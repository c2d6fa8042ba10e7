"""Gradients of weights, computed after those of inputs: what a zero-bubble pipeline fills its gaps with.

Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2: of a backward pass, the stage before waits for the
gradients of inputs alone. torch can tell the two apart in any model, by walking over the graph of each microbatch and
calling autograd once for each weight. Here linear layers, whose products are half of a backward pass, put aside what
their weight's gradient is made of; all other gradients are computed with those of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Postponed = list[tuple[Tensor, Tensor, Tensor]]
"""A layer's parameter [O, I], its input [..., I] and the gradient of its output [..., O]."""


class WeightGradients:
    """Those of the linear layers of ``part``, which are changed in place: its backward pass leaves them out.

    dtype: what FSDP reduces gradients in; they are added up in it over the microbatches.
    """

    def __init__(self, part: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._postponed: Postponed = []
        for module in part.modules():
            if type(module) is nn.Linear:  # not one with an adapter, whose own weight is frozen
                module.forward = partial(self._forward, module, module.weight)  # type: ignore[method-assign]

    def take(self) -> Callable[[], None]:
        """What the backward passes since the last call have left out: a function that computes it."""
        postponed, self._postponed = self._postponed, []
        return partial(_compute, postponed)

    def _forward(self, module: nn.Linear, parameter: Tensor, x: Tensor) -> Tensor:
        weight = module.weight
        trained = parameter  # where ``compute_in`` has put a copy in its place
        if weight.is_leaf:  # what FSDP has gathered, whose gradient it reduces
            trained = weight
            trained.grad_dtype = self.dtype
        y: Tensor = _Linear.apply(x, weight, module.bias, partial(self._postpone, trained))
        return y

    def _postpone(self, *factors: Tensor) -> None:
        self._postponed.append(factors)  # type: ignore[arg-type]


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias; the gradient of the weight is left to ``postpone``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, postpone: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.postpone = postpone
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        if for_weight:
            ctx.postpone(x, grad)
        return grad @ weight if for_x else None, None, grad.flatten(0, -2).sum(0) if for_bias else None, None


def _compute(postponed: Postponed) -> None:
    while postponed:  # each is freed after use
        parameter, x, grad = postponed.pop()
        gradient = grad.flatten(0, -2).T @ x.flatten(0, -2)
        if parameter.grad is None:
            parameter.grad = gradient.to(parameter.grad_dtype)
        else:
            parameter.grad += gradient
