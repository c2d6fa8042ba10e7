"""Libraries in other languages: exceptions of theirs that are no ``Exception``, and code that may end its process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

_SECONDS = 120


def is_panic(error: BaseException) -> bool:
    """Whether it is what becomes of a panic in Rust, which derives from BaseException."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def panics_as(kind: type[Exception], message: str) -> Iterator[None]:
    """Raise a panic in Rust as ``kind``, with ``message`` in front."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise kind(f"{message}: {error}") from None


def tried_apart(code: str, *arguments: str) -> str | None:
    """Run Python ``code`` with ``arguments`` in a process of its own. What went wrong, or None.

    For what a library may answer by ending the process.
    """
    command = [sys.executable, "-I", "-c", code, *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"reading it takes more than {_SECONDS} s"
    except (OSError, ValueError) as error:
        return str(error)
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"reading it kills the process by signal {-done.returncode}"
    return done.stderr.strip().rpartition("\n")[2] or "it cannot be read"
