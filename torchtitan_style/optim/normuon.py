"""NorMuon: the rows of an orthogonal matrix brought to one size (Li et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-10
"""Added to the root, as in the authors' code; a row of zeros stays one."""


def normalize_rows(matrices: Tensor, mean_squares: Tensor, taken: Tensor, *, beta2: float) -> None:
    """Divide each row by the root of the running mean of its squares, in place; each matrix keeps its norm.

    matrices: [..., M, N], orthogonal. mean_squares: [..., M, 1] in fp32, updated in place if ``taken``, a 0-dim bool.
    beta2: decay of the running mean. It starts at zero and is not corrected for that: a factor that all rows share
    cancels.

    Algorithm 1 of "NorMuon: Making Muon more efficient and scalable". The paper then scales the matrix so that its
    elements have a root mean square of 0.2. Here its norm is restored, as in the authors' code, so that
    ``step_scale`` applies.
    """
    values = matrices.float()
    sums = values.square().sum(-1, keepdim=True)
    mean_squares.lerp_(torch.where(taken, sums / matrices.shape[-1], mean_squares), 1 - beta2)
    factors = 1 / (mean_squares.sqrt() + EPS)
    norms = sums.sum(-2, keepdim=True).sqrt()
    changed = (sums * factors.square()).sum(-2, keepdim=True).sqrt()
    matrices.copy_(values.mul_(factors * (norms / changed.clamp(min=EPS))))
