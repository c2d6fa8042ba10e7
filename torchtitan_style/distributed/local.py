"""What a rank holds of a tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_tensor(tensor: Any) -> Tensor:
    """What this rank holds of ``tensor``, plain or DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Any) -> Tensor:
    """All of ``tensor``, gathered if need be. Called by all ranks that hold it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What this rank holds of ``parameter``, and which part of the whole it is."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, size) for size in parameter.shape)
    sizes, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    where = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
    return parameter.to_local(), where
