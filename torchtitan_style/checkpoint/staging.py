"""Copies of a rank's state in host memory, to write from while training goes on."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from torchtitan_style.distributed.local import local_tensor

_ALIGNMENT = 64
"""Bytes; as torch aligns a tensor of its own."""


class Staging:
    """A buffer for copies, pinned for CUDA, made at the first use and used again: one set of copies at a time.

    There is one for all tensors, as torch would round up pinned memory of each to a power of two.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._places: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of each tensor, as it is now, in host memory."""
        parts = {name: local_tensor(tensor) for name, tensor in tensors.items()}
        on_gpu = any(part.is_cuda for part in parts.values())
        if _shapes(parts) != _shapes(self._places):
            self._make_places(parts, pin=on_gpu)
        for name, part in parts.items():
            self._places[name].copy_(part, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return dict(self._places)

    def _make_places(self, parts: Mapping[str, Tensor], *, pin: bool) -> None:
        self._places.clear()
        sizes = [-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in parts.values()]
        self._buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        if pin:
            _pin(self._buffer)
        memory = self._buffer.untyped_storage()
        for (name, part), start in zip(parts.items(), accumulate(sizes, initial=0), strict=False):
            # A storage of its own: ``torch.save`` writes all of the storage that a tensor is in.
            place = torch.empty(0, dtype=part.dtype).set_(memory[start : start + part.nbytes])  # type: ignore[call-overload]
            self._places[name] = place.view(part.shape)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _pin(buffer: Tensor) -> None:
    """Have CUDA lock the memory of ``buffer`` in place, so that copies into it run at full speed, until it is freed."""
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    torch.cuda.check_error(int(runtime.cudaHostRegister(address, buffer.nbytes, 0)))
    weakref.finalize(buffer, runtime.cudaHostUnregister, address).atexit = False
