"""Products of several matrices, each with its own rows, for numbers of rows that change in every step.

oneDNN compiles a kernel for each number of rows: half a millisecond and 0.7 MiB each, hundreds of them in a step
(docs/moe.md). Here numbers of rows are rounded up to a few sizes, so that kernels of earlier steps are used again.

Shapes: M rows, E matrices, O features out, K features in. ends: [E] int32, the row after the last of each matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def grouped_products(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each weight times its rows. rows: [M, K], those of the first weight first. weight: [E, O, K]. → [M, O]"""
    return _products(rows, weight.mT, ends)


def grouped_gradients(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """grad: [M, O], of what ``grouped_products`` returned. → gradients of rows [M, K] and weight [E, O, K]."""
    weight_grad = torch.empty_like(weight)
    for expert, start, count in _parts(ends):
        size = rounded_up(count)
        # Rows of zeros add nothing. The first operand of a product is read fast if it lies in rows (operands.py).
        columns = grad.new_empty(grad.shape[1], size)
        columns[:, :count] = grad[start : start + count].mT
        columns[:, count:] = 0
        torch.mm(columns, _with_zeros(rows, start, count, size), out=weight_grad[expert])
    return _products(grad, weight, ends), weight_grad


def _products(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows: [M, K]. weight: [E, K, O]. → [M, O]"""
    total, columns = len(rows), weight.shape[2]
    product = rows.new_empty(total, columns)
    for expert, start, count in _parts(ends):
        size = rounded_up(count)
        if start + size <= total:  # what follows is another weight's, whose product is written over this one's
            torch.mm(rows[start : start + size], weight[expert], out=product[start : start + size])
        else:
            product[start : start + count] = (_with_zeros(rows, start, count, size) @ weight[expert])[:count]
    return product


def _parts(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """Number, first row and number of rows of each matrix, in their order."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        yield expert, start, end - start
        start = end


def _with_zeros(rows: Tensor, start: int, count: int, size: int) -> Tensor:
    """``count`` rows from ``start`` on, and zeros: [size, K]."""
    taken = rows.new_empty(size, rows.shape[1])
    taken[:count] = rows[start : start + count]
    taken[count:] = 0
    return taken


def rounded_up(count: int) -> int:
    """``count`` rounded up to a multiple of 16; from 128 on to one of eight sizes between a power of two and the next.

    >>> [rounded_up(count) for count in (0, 1, 127, 129, 257, 1000)]
    [0, 16, 128, 144, 288, 1024]
    """
    step = max(16, 2 ** (count.bit_length() - 4)) if count else 1
    return -(-count // step) * step
