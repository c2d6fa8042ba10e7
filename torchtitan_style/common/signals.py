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


class OutOfTime(Exception):
    """Something took longer than it may."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in what is done in this context after so many seconds; only in the main thread, which alone
    hears signals, and only where nobody else uses SIGALRM."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGALRM) != signal.SIG_DFL:
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise OutOfTime(f"it takes more than {seconds:g} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
