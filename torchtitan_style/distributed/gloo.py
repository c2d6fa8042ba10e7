"""Gloo groups in which one thread does the work.

Each of torch's has two, and both write the name of the operation they have finished to one string, without a lock
(torch 2.11 to 2.13, ``ProcessGroupGloo::runLoop``). A name of more than 15 letters is on the heap, and DTensor's
gathers have one, ALLGATHER_COALESCED: two operations that end at the same moment then free memory twice. What follows
is anything, mostly an abort by glibc; one of 70 short runs of four ranks on two cores ended like that. torch gives no
way to choose the number of threads of a group that it makes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["one_thread_each"]


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Gloo groups that are made meanwhile have one thread, so that their operations end one after the other."""
    if not dist.is_gloo_available():
        yield
        return

    torchs: Any = distributed_c10d
    gloo = torchs.ProcessGroupGloo

    class OneThread(gloo):  # type: ignore[valid-type, misc]
        def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
            options = gloo._Options()
            # As torch chooses them where it is not asked for options.
            interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
            devices = [gloo.create_device(interface=name) for name in interfaces]
            options._devices = devices or [gloo.create_default_device()]
            options._timeout = timeout
            options._threads = 1
            super().__init__(store, rank, size, options)

    torchs.ProcessGroupGloo = OneThread
    try:
        yield
    finally:
        torchs.ProcessGroupGloo = gloo
