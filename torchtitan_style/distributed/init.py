"""Initial weights that depend on the seed and the parameter's name alone, not on the mesh.

A parameter is drawn in tiles of whole rows, each from a generator seeded by (seed, name, tile). A
rank draws the tiles that its shard touches and no others, so the work shrinks with the number of
ranks, and every layout has the same weights bit for bit. The draws are made on the CPU, so that
they do not depend on the device either.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .local import local_part

_TILE = 2**20
"""Elements drawn from one generator, about: many enough for speed, few enough to hold."""


@torch.no_grad()
def init_weights(model: nn.Module, *, seed: int, initial_std: Callable[[str], float | None]) -> None:
    """Fill every parameter of ``model``, plain or DTensor, in place.

    initial_std: parameter name → standard deviation, None for all ones, or NaN for what is to be read later: it is NaN
    until then.
    """
    for name, parameter in model.named_parameters():
        std = initial_std(name)
        if std is None:
            parameter.fill_(1.0)
        elif std == 0.0:
            parameter.zero_()
        elif math.isnan(std):
            parameter.fill_(math.nan)
        else:
            draw(parameter, std, f"{seed}/{name}")


@torch.no_grad()
def draw(parameter: Tensor, std: float, key: str) -> None:
    """Fill ``parameter``, plain or DTensor, with numbers that depend on ``key`` alone."""
    shape = parameter.shape
    local, (outer, *inner) = local_part(parameter)
    if local.numel() == 0:
        return
    rows = max(1, _TILE // shape[1:].numel())
    first, last = outer.start, outer.stop
    for tile in range(first // rows, (last - 1) // rows + 1):
        start, stop = tile * rows, min((tile + 1) * rows, shape[0])
        digest = hashlib.blake2b(f"{key}/{tile}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        values = torch.empty(stop - start, *shape[1:]).normal_(0.0, std, generator=generator)
        low, high = max(start, first), min(stop, last)
        local[low - first : high - first].copy_(values[(slice(low - start, high - start), *inner)])
