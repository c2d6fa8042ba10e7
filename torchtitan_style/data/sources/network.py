"""Patience with networks: what fails is tried again, later and later."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from torchtitan_style.common.errors import RunError

T = TypeVar("T")

ATTEMPTS = 8
"""Failures in a row after which it is given up: some two minutes."""
_FIRST_WAIT = 1.0


def patiently(action: Callable[[], T], url: str) -> T:
    """Result of ``action``, which talks to a server about ``url``.

    What is no matter of the network, as a file that is not there, is raised at once. Raises RunError when
    patience is at an end.
    """
    failures = 0
    while True:
        try:
            return action()
        except Exception as error:  # each protocol's library has its own kinds
            if is_permanent(error):
                raise
            failures += 1
            wait_before(failures + 1, url, error)


def is_permanent(error: Exception) -> bool:
    """Whether ``error`` is no matter of the network: to try again would not help."""
    if not isinstance(error, FileNotFoundError):
        return isinstance(error, PermissionError | ImportError | ValueError)
    # Of a web server that fails or cannot be reached, fsspec says too that the file is not there.
    cause = error.__cause__
    if type(cause).__module__.startswith("aiohttp") or isinstance(cause, asyncio.TimeoutError):
        return getattr(cause, "status", 500) in (401, 403, 404, 410)
    return True


def wait_before(attempt: int, url: str, error: Exception) -> None:
    """Report ``error`` and wait for 1, 2, 4 … seconds before attempt number ``attempt`` (from 2)."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # see is_permanent
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if attempt > ATTEMPTS:
        raise RunError(f"{url} could not be read in {ATTEMPTS} attempts: {reason}; run the same command to resume")
    wait = _FIRST_WAIT * 2 ** (attempt - 2)
    print(f"warning: {url}: {reason}; attempt {attempt} of {ATTEMPTS} in {wait:.0f} s", file=sys.stderr, flush=True)
    time.sleep(wait)
