"""Copies of a rank's state in host memory, to write from while training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchtitan_style.distributed.local import local_tensor


class Staging:
    """Buffers for copies, pinned for CUDA, made at the first use and used again: one set of copies at a time."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of each tensor, as it is now, in host memory."""
        on_gpu = False
        for name, tensor in tensors.items():
            local = local_tensor(tensor)
            on_gpu |= local.is_cuda
            buffer = self._buffers.get(name)
            if buffer is None:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(local, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return {name: self._buffers[name] for name in tensors}
