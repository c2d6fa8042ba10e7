"""How a program reports an error: one message and an exit status, however many ranks have the error."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from .errors import RunError, UserError, bounded, cut
from .native import is_panic
from .program import STOP_SIGNALS

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)
"""Faults of a disk, not of the program."""

_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ, errno.ENXIO, errno.ENODEV)
"""Faults of the name of a file, which a person has given."""

VERDICT = "TORCHTITAN_STYLE_VERDICT"
"""Environment variable with the name of a file. The first rank of a host that ends with an expected error creates it
and writes its exit status there. The error is then reported, and another attempt would only repeat it."""


def verdict_status() -> int | None:
    """The exit status that a rank of this launch has left in the verdict file; None if there is none."""
    verdict = os.environ.get(VERDICT)
    if not verdict or not os.path.exists(verdict):
        return None
    return int(Path(verdict).read_text(encoding="utf-8") or 1)


def check_verdict() -> None:
    """Exit if an earlier attempt of this launch ended with an error that another attempt would only repeat."""
    status = verdict_status()
    if status is not None and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise SystemExit(status)


def report_stopped() -> None:
    """Tell the launcher that this rank ends because the run was told to stop, not because it is complete."""
    if verdict := os.environ.get(VERDICT):
        _stopped(verdict).touch()


def take_stopped() -> bool:
    """In the launcher: whether a rank has called ``report_stopped`` since the last call of this function."""
    try:
        _stopped(os.environ[VERDICT]).unlink()
    except (KeyError, FileNotFoundError):
        return False
    return True


def _stopped(verdict: str) -> Path:
    return Path(f"{verdict}.stopped")


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Report expected errors as a message, and exit: with status 2 after a UserError, else with 1.

    Of several ranks on a host, the first that fails reports the error and the others exit silently. So it is with the
    traceback of an unexpected exception; in a single process that propagates.
    """
    try:
        yield
    except (UserError, RunError) as error:
        _report(str(error), 2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:  # before training, which handles it itself
        raise SystemExit(130) from None
    except SystemExit:
        raise
    except BaseException as error:  # what DCP and libraries in Rust raise is no Exception
        if expected := _expected(error):
            _report(*expected)
        if "RANK" not in os.environ:
            raise
        if _is_first("exception", 1):
            print(f"rank {os.environ['RANK']} failed:\n{traceback.format_exc()}", end="", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _expected(error: BaseException) -> tuple[str, int] | None:
    """Message and status for an exception that is no fault of the program, or None."""
    if isinstance(error, OSError) and error.errno in _DISK:
        return bounded(str(error)), 1
    if isinstance(error, OSError) and error.errno in _NAMES and error.filename is not None:
        return bounded(f"{cut(str(error.filename), 200)}: {error.strerror}"), 2
    if isinstance(error, UnicodeEncodeError) or (isinstance(error, ValueError) and "null byte" in str(error)):
        return bounded(f"a name is not text: {error}"), 2
    if is_panic(error):
        return bounded(f"a library failed on its input: {error}"), 2
    if type(error).__name__ == "CheckpointException":
        return bounded(f"a checkpoint cannot be read or written: {error}"), 1
    return None


def _report(message: str, status: int) -> NoReturn:
    if _is_first("error", status):
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status) from None


def _is_first(kind: str, status: int) -> bool:
    """Whether no other rank of this host and attempt has failed in this way before this one."""
    marker = _marker(kind)
    if marker is None:
        return True
    for number in STOP_SIGNALS:  # the launcher stops all ranks when one ends, maybe before this one has spoken
        signal.signal(number, signal.SIG_IGN)
    try:
        descriptor = os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return False
    except OSError:
        return True
    with os.fdopen(descriptor, "w") as file:
        file.write(str(status))
    return True


def _marker(kind: str) -> Path | None:
    """The file that the first rank to fail creates: None if the ranks of this host have no folder in common."""
    if "RANK" not in os.environ:
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if verdict := os.environ.get(VERDICT):
        return Path(verdict) if kind == "error" else Path(f"{verdict}.{kind}-{attempt}")
    if files := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # of a bare torchrun: ATTEMPT/RANK/error.json
        return Path(files).parents[1] / kind
    return None
