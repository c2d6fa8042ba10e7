"""Locks that keep processes of all hosts that share a file system from each other."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .files import clock_offset, first_missing, remove_empty
from .reading import parse_json

_DYING = 1.0
"""Seconds that a process which was just killed may take to release a lock."""
_STALE = 120.0
"""Seconds without an update after which a holder on another host counts as ended."""
_LEASE = 150.0
"""Seconds that a file server may take to release the lock of a host that is lost; 90 is usual with NFS."""


class InUse(Exception):
    """Another process holds the lock; the message names it, as "process 7 on node0"."""


@contextlib.contextmanager
def lock_file(path: Path, *, run: str = "") -> Iterator[None]:
    """Hold the lock ``path``, a file that is created, names this process, and is removed at the end.

    run: what tells a run on several hosts from others. Its hosts have agreed on who takes part, so a process of the
    same run that still holds the lock belongs to a host that is lost, or is about to end: its lock is taken over once
    the file system has released it.

    The kernel releases the lock when the process ends, however it ends. Where a file system does not share locks
    between hosts, they compare the file's modification time, which the holder updates. Raises InUse, or OSError if the
    file cannot be created. (filelock does not fit: it truncates the file as it opens it, and with it the holder's
    name.)
    """
    while (file := _take_current(path, run)) is None:
        pass
    done = threading.Event()
    threading.Thread(target=_keep_fresh, args=(path, done), name=path.name, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        path.unlink(missing_ok=True)
        os.close(file)


def check_unlocked(path: Path, *, run: str = "") -> None:
    """Raise InUse if another process holds the lock ``path``. Leaves no trace. run: as of ``lock_file``."""
    with contextlib.suppress(FileNotFoundError):
        file = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        try:
            _take(file, path, run=run)
        except OSError as error:
            if error.errno != errno.ESTALE:  # its holder has just removed it
                raise
        finally:
            os.close(file)


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One process at a time, of all hosts; the others wait. ``folder`` need not exist: the lock is a file beside it.

    If that file cannot be created there is no lock: this process cannot write to the folder either.
    """
    path = folder.with_name(f"{folder.name}.lock")
    made = first_missing(path.parent)
    said = False
    with contextlib.ExitStack() as stack:
        stack.callback(remove_empty, path.parent, up_to=made)
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_file(path))
                break
            except InUse as other:
                if not said:
                    say(f"waiting for {other}, which uses {folder}")
                said = True
                time.sleep(0.2)
            except OSError:
                break
        yield


def _take_current(path: Path, run: str) -> int | None:
    """The locked file; None if its holder before has just removed it, and a new one has to be made."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    try:
        links = os.fstat(file).st_nlink
        _take(file, path, run=run)
        # With NFS the name may be seen for a while after it is gone, but what locks a file sees its links anew.
        if os.fstat(file).st_nlink >= links and os.path.samestat(os.fstat(file), path.stat()):
            os.truncate(file, 0)
            os.pwrite(file, json.dumps(_me(run)).encode(), 0)
            os.fsync(file)  # other hosts would not see it until it is closed
            return file
    except BaseException as error:
        os.close(file)
        if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno == errno.ESTALE):
            return None
        raise
    os.close(file)
    return None


def _take(file: int, path: Path, *, run: str) -> None:
    """Lock ``file``. Raises InUse."""
    start = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = _holder(file)
            if time.monotonic() - start > (_LEASE if _is_same_run(holder, run) else _DYING):
                raise _in_use(holder) from None
            time.sleep(0.05)
        except OSError as error:
            if error.errno == errno.ESTALE:
                raise
            break  # a file system without locks: the file's time has to do
    holder = _holder(file)
    if holder and holder.get("host") != socket.gethostname() and not _is_same_run(holder, run):
        age = max(0.0, time.time() + clock_offset(path.parent) - os.fstat(file).st_mtime)
        if age < _STALE:
            raise _in_use(
                holder, f", whose last heartbeat was {age:.0f} s ago; if it is gone, wait {_STALE - age:.0f} s"
            )


def _me(run: str) -> dict[str, Any]:
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    return me | {"run": run} if run else me


def _is_same_run(holder: dict[str, Any], run: str) -> bool:
    return bool(run) and holder.get("run") == run


def _holder(file: int) -> dict[str, Any]:
    try:
        found = parse_json(os.pread(file, 4096, 0))
        return found if isinstance(found, dict) else {}
    except ValueError:  # just made
        return {}


def _in_use(holder: dict[str, Any], more: str = "") -> InUse:
    return InUse(f"process {holder.get('pid', '?')} on {holder.get('host', '?')}{more}")


def _keep_fresh(path: Path, done: threading.Event) -> None:
    while not done.wait(_STALE / 6):
        with contextlib.suppress(OSError):
            os.utime(path)
