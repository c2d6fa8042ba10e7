"""How a program reports an error that it expects: one message and an exit status, no traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import RunError, UserError
from .program import STOP_SIGNALS

__all__ = ["VERDICT", "check_verdict", "reported_errors"]

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)
"""What is wrong with a disk, and not with the program."""

VERDICT = "TORCHTITAN_STYLE_VERDICT"
"""Environment variable with the name of a file, in which a rank leaves the status that it has ended with after an
error that another attempt would not cure. Ranks that are started again after that end with it at once."""

_PATIENCE = 10
"""Seconds that the other ranks stay for the first to say what is wrong. Launchers end all once one has ended."""


def check_verdict() -> None:
    """Exit if an earlier attempt of this launch has ended with an error that another one would not cure."""
    verdict = os.environ.get(VERDICT)
    if verdict and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.path.exists(verdict):
        raise SystemExit(int(Path(verdict).read_text(encoding="utf-8") or 1))


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Print expected errors as a message and exit: with status 2 if a person can put it right, else 1.

    With several ranks mostly all have the same error, and the first prints it, before any of them has ended.
    """
    try:
        yield
    except (UserError, RunError) as error:
        status = 2 if isinstance(error, UserError) else 1
        if verdict := os.environ.get(VERDICT):
            Path(verdict).write_text(str(status), encoding="utf-8")
        if os.environ.get("RANK", "0") != "0" and error.everywhere:
            _wait_for_the_end(status)  # and if none comes, this rank alone has the error
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(status) from None
    except KeyboardInterrupt:  # before training, which has a way of its own
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno not in _DISK:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _wait_for_the_end(status: int) -> None:
    """Exit with ``status`` when the launcher says that another rank has ended; return if it does not."""

    def end(_number: int, _frame: object) -> None:
        raise SystemExit(status)

    for number in STOP_SIGNALS:
        signal.signal(number, end)
    time.sleep(_PATIENCE)
