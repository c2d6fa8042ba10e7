"""Rotary position embedding (Su et al. 2021, section 3.2.2), in the half-split convention of Transformers.

With YaRN (Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models") a model reads rows
that are longer than those that it was trained on: wavelengths that fit into the old rows many times stay as they are,
those that do not fit once are stretched by the factor, and between the two there is a ramp. Attention is sharpened a
little to make up for the longer rows.

Each number is rounded as Transformers rounds it: at position 40,000 the last bit of a frequency is 0.004 of a cosine.

Shapes: B batch, T positions, H heads, D head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import Yarn


def rotary_cos_sin(
    positions: Tensor, *, head_dim: int, theta: float, yarn: Yarn | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, fp32; with ``yarn`` times its attention factor.

    positions: [B, T] or [1, T] integers. Returns two [B, T, D] tensors, the D/2 frequencies
    twice over, as the half-split convention wants them.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    wavelengths = theta**exponents
    # Not theta**-exponents, which rounds otherwise.
    frequencies = 1.0 / wavelengths if yarn is None else _stretched(wavelengths, head_dim, theta, yarn)
    angles = positions[..., None].float() * frequencies  # [B, T, D/2]
    angles = torch.cat((angles, angles), dim=-1)
    if yarn is None:
        return angles.cos(), angles.sin()
    return angles.cos() * yarn.attention_factor, angles.sin() * yarn.attention_factor


def _stretched(wavelengths: Tensor, head_dim: int, theta: float, yarn: Yarn) -> Tensor:
    """YaRN's frequencies (section 3.2, "NTK-by-parts"). wavelengths: [D/2], divided by 2π."""

    def dimension(rotations: float) -> float:
        """Where a wavelength fits so often into the rows that the model was trained on."""
        return head_dim * math.log(yarn.trained_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    number = torch.arange(head_dim // 2, dtype=torch.float32, device=wavelengths.device)
    kept = 1 - torch.clamp((number - first) / (last - first), 0, 1)
    return 1.0 / (yarn.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by its angle. x: [B, T, H, D]; cos, sin: [B, T, 1, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
