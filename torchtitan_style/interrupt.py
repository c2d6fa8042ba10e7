"""Ctrl-C and SIGTERM: stop at once, say where the run can go on, leave no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["interruptible", "on_interrupt"]

_received: list[int] = []
_farewell: list[Callable[[], None]] = []


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
