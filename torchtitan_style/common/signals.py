"""The signals that ask a run to stop, and keeping them from where they do harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from .program import STOP_SIGNALS


@contextlib.contextmanager
def shielding_children() -> Iterator[None]:
    """Child processes that this thread starts in this context never receive a signal to stop; this process does.

    Terminals and launchers signal a rank's children along with it. Without this the compiler, or the
    loader's workers, are taken away from a rank that has yet to finish its step and to save.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a child inherits it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def holding_interrupts() -> Iterator[None]:
    """Defer Ctrl-C to the end of this context: for code whose callbacks into Python drop exceptions."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)
