"""The nearest orthogonal matrix, or close enough, by matrix multiplications alone."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the quintic a·σ + b·σ³ + c·σ⁵. They are chosen for the steepest rise at 0: five rounds take every
singular value from 0.001 on to somewhere in 0.7 … 1.2, and need not take it to 1 (Jordan 2024)."""


def orthogonalize(matrix: Tensor, *, rounds: int, head_dim: int | None = None, eps: float = 1e-7) -> Tensor:
    """U·Vᵀ of ``matrix`` = U·S·Vᵀ, about, by Newton–Schulz iteration in the type of ``matrix``.

    [M, N] → [M, N]. X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ maps every singular value by the quintic and
    leaves the singular vectors alone. 2·rounds·(2·m²·n + m³) multiply-adds for m = min(M, N), n = max(M, N).
    head_dim: take every so many rows as a matrix of their own.
    """
    a, b, c = COEFFICIENTS
    x = matrix if head_dim is None else matrix.unflatten(0, (-1, head_dim))  # [M, N] or [H, D, N]
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # A is the smaller of the two squares
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)  # no singular value above 1
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(rounds):
        gram = x @ x.mT
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        x = add_product(x, polynomial, x, beta=a)
    return (x.mT if tall else x).reshape(matrix.shape)


def step_scale(rows: int, columns: int, adjust_lr: str) -> float:
    """Factor on the learning rate for a matrix [out, in] of these sizes.

    "original": √max(1, out/in), so that outputs change alike whatever the shape (Jordan 2024).
    "match_rms_adamw": 0.2·√max(out, in), so that an element changes by about as much as under AdamW, whose
    learning rate and weight decay then fit (Liu et al. 2025, section 2.2).
    """
    if adjust_lr == "original":
        return max(1.0, rows / columns) ** 0.5
    return 0.2 * max(rows, columns) ** 0.5
