"""The signals that ask a run to stop, and keeping them from the processes that it starts."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

__all__ = ["STOP_SIGNALS", "shielding_children"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what torchrun, Kubernetes and SLURM send; what SLURM can be told to send ahead of the time limit."""


@contextlib.contextmanager
def shielding_children() -> Iterator[None]:
    """Processes that this thread starts meanwhile never get a signal to stop; this process still does.

    Terminals and launchers signal a rank's children along with it. Without this the compiler, or the
    loader's workers, are taken away from a rank that has yet to finish its step and to save.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a child inherits it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
