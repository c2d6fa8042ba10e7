"""Gloo groups in which one thread does the work.

Each of torch's has two, and both write the name of the operation they have finished to one string, without a lock
(torch 2.11 to 2.13, ``ProcessGroupGloo::runLoop``; 2.14.1 declares the same string and the same two threads). A name of
more than 15 letters is on the heap, and DTensor's gathers have one, ALLGATHER_COALESCED: two operations that end at the
same moment then free memory twice. What follows is anything, mostly an abort by glibc; one of 70 short runs of four
ranks on two cores ended like that. torch gives no way to choose the number of threads of a group that it makes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Gloo groups that are made meanwhile have one thread, so that their operations end one after the other."""
    if not dist.is_gloo_available():
        yield
        return

    torchs: Any = distributed_c10d
    gloo = torchs.ProcessGroupGloo

    class OneThread(gloo):  # type: ignore[valid-type, misc]
        def __init__(self, store: dist.Store, rank: int, size: int, *args: Any, **named: Any) -> None:
            # Torch passes a timeout, and later versions more by name: what its options do not know is left to torch.
            timeout = named.get("timeout", args[0] if args else None)
            options = gloo._Options()
            unknown = [name for name in named if name != "timeout" and not hasattr(options, name)]
            if len(args) > 1 or unknown or not isinstance(timeout, timedelta):
                _warn_once(f"torch {torch.__version__} creates gloo groups in an unknown way")
                super().__init__(store, rank, size, *args, **named)
                return
            # As torch chooses them where it is not asked for options.
            interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
            devices = [gloo.create_device(interface=name) for name in interfaces]
            options._devices = devices or [gloo.create_default_device()]
            options._timeout = timeout
            options._threads = 1
            for name, value in named.items():
                if name != "timeout":
                    setattr(options, name, value)
            super().__init__(store, rank, size, options)

    torchs.ProcessGroupGloo = OneThread
    try:
        yield
    finally:
        torchs.ProcessGroupGloo = gloo


@functools.cache
def _warn_once(what: str) -> None:
    print(f"warning: {what}; they use two threads, which may occasionally abort a rank", file=sys.stderr)
