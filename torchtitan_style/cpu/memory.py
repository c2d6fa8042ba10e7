"""Memory of tensors on CPUs: how glibc is told to keep it."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TUNABLES = ("GLIBC_TUNABLES", "glibc.malloc.tcache_max=24:glibc.malloc.mxfast=24")
"""Name and value of the environment variable of a process that trains, from its start on.

Tensors are aligned to 64 bytes, which leaves 48 unused before each. glibc keeps pieces of up to 1 KiB in a cache of the
thread, which hands them out and never joins them with what becomes free around them: the place of a tensor that is gone
is then too short for the next one of the same size, and the heap grows (docs/performance.md).
"""


def keep_tensors_apart(device: torch.device) -> None:
    """Have the C library map each tensor by itself, for the time until ``keep_freed_memory``.

    What the compiler leaves behind in the first step would otherwise lie in the gaps between tensors, for good: a
    tenth of the memory was then in pieces that fit nothing (docs/performance.md).
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD in malloc.h
    if mallopt := _mallopt(device):
        mallopt(mmap_threshold, 2**18)


@functools.cache
def keep_freed_memory(device: torch.device) -> None:
    """Have the C library keep the memory of tensors that are gone for those that come, from the second step on.

    Left to itself glibc gives it back to the system at the end of every step, and each page of it is faulted in anew
    in the next one: on CPU up to a quarter of the time (docs/performance.md). Other C libraries are left alone.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h
    if mallopt := _mallopt(device):
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)  # blocks above the largest threshold there is would be returned in any case


def _mallopt(device: torch.device) -> Callable[[int, int], int] | None:
    """glibc's, if tensors are in its hands."""
    if device.type != "cpu" or sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)
