"""Matrix products of several experts as one operation, which a compiler takes as it is.

On CPU torch.nn.functional.grouped_mm has no compiled form, and another way is faster. On CUDA torch refuses to trace
it in fp32 although it runs. There the products are an operation with a gradient of its own.

Shapes: M rows, E experts, O features out, K features in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchtitan_style.cpu.grouped import grouped_gradients, grouped_products


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each expert's weight times its rows. rows: [M, K], those of the first expert first. weight: [E, O, K]. ends: [E]
    int32, the row after the last of each expert. → [M, O]"""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weight.mT, offs=ends)
    product: Tensor = _linear(rows, weight, ends)
    return product


@torch.library.custom_op("torchtitan_style::grouped_linear", mutates_args=())
def _linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, weight.mT, offs=ends) if rows.is_cuda else grouped_products(rows, weight, ends)


@_linear.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("torchtitan_style::grouped_linear_backward", mutates_args=())
def _backward(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """grad: [M, O]. → gradients of rows [M, K] and weight [E, O, K]."""
    if len(rows) == 0:  # of no rows the strides are refused
        return torch.empty_like(rows), torch.zeros_like(weight)
    if not rows.is_cuda:
        return grouped_gradients(grad, rows, weight, ends)
    grad = grad.contiguous()
    return F.grouped_mm(grad, weight, offs=ends), F.grouped_mm(grad.mT, rows, offs=ends)


@_backward.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_backward(grad, *ctx.saved_tensors), None


_linear.register_autograd(_gradients, setup_context=_save)


# Without these the compiler would take them for cheap, and choose them for recomputation.


@register_flop_formula(torch.ops.torchtitan_style.grouped_linear)
def _flops(rows: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.torchtitan_style.grouped_linear_backward)
def _backward_flops(grad: tuple[int, ...], rows: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 4 * rows[0] * weight[1] * weight[2]
