"""How a rank ends: when it is done, by an error, or told to by Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["ending_at_once", "interruptible", "on_interrupt"]

_received: list[int] = []
_farewell: list[Callable[[], None]] = []


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """End the process when this context ends, whichever way, without Python's orderly shutdown.

    A thread of gloo's may still be letting go of the last collective's tensors, and needs the
    interpreter for it; if that is shutting down, the thread aborts the process (torch 2.13, in one of
    five runs of two ranks). All files are closed by now.
    """
    status: object = 0
    try:
        yield
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def on_interrupt(farewell: Callable[[], None]) -> None:
    """Have ``farewell`` called if the program is interrupted. It must not communicate with other ranks."""
    _farewell[:] = [farewell]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Exit with status 130 (Ctrl-C) or 143 (SIGTERM) when told to, without a traceback.

    A signal reaches all ranks. One of them may be told first by the others' broken connections, so
    any error after a signal counts as its consequence.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        yield
    except BaseException:
        if not _received:
            raise
        for farewell in _farewell:
            with contextlib.suppress(Exception):
                farewell()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: leaving the process group in order would wait for ranks that are gone.
        os._exit(128 + _received[0])


def _interrupt(number: int, _frame: FrameType | None) -> None:
    _received.append(number)
    for again in (signal.SIGINT, signal.SIGTERM):  # the launcher repeats the terminal's signal
        signal.signal(again, signal.SIG_IGN)
    raise KeyboardInterrupt
