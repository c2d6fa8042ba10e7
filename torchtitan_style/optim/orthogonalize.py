"""The nearest orthogonal matrix, or close enough, by matrix multiplications alone."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the quintic a·σ + b·σ³ + c·σ⁵. They are chosen for the steepest rise at 0: five rounds take every
singular value from 0.001 on to somewhere in 0.7 … 1.2, and need not take it to 1 (Jordan 2024)."""


def orthogonalize(matrices: Tensor, *, rounds: int, eps: float = 1e-7) -> Tensor:
    """U·Vᵀ of each matrix U·S·Vᵀ, about, by Newton–Schulz iteration in the type of ``matrices``.

    [..., M, N] → [..., M, N], each by itself. X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ maps every singular value by the
    quintic and leaves the singular vectors alone. rounds·(2·m²·n + m³) multiply-adds a matrix, m = min(M, N),
    n = max(M, N).
    """
    a, b, c = COEFFICIENTS
    x = matrices.reshape(-1, *matrices.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # A is the smaller of the two squares
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)  # no singular value above 1
    for _ in range(rounds):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def step_scale(rows: int, columns: int, adjust_lr: str) -> float:
    """Factor on the learning rate for a matrix [out, in] of these sizes.

    "original": √max(1, out/in), so that outputs change alike whatever the shape (Jordan 2024).
    "match_rms_adamw": 0.2·√max(out, in), so that an element changes by about as much as under AdamW, whose
    learning rate and weight decay then fit (Liu et al. 2025, section 2.2).
    """
    if adjust_lr == "original":
        return max(1.0, rows / columns) ** 0.5
    return 0.2 * max(rows, columns) ** 0.5
