"""One run at a time in a dump folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import clock_offset, first_missing, remove_empty
from torchtitan_style.common.reading import parse_json

NAME = "run.lock"
_DYING = 1.0
"""Seconds that a process which was just killed may take to release the lock."""
_STALE = 120.0
"""Seconds without an update after which a run on another host counts as ended."""
_LEASE = 150.0
"""Seconds that a file server may take to release the lock of a host that is lost; 90 is usual with NFS."""


@contextlib.contextmanager
def run_lock(folder: Path, *, run: str = "") -> Iterator[None]:
    """Lock ``folder`` for this process. It is created if needed, and removed again if it is left empty.

    run: what tells this run on several hosts from others: the address where its hosts meet. They agree there on who
    takes part, so a process that still holds the lock belongs to a host that is lost, or is about to end: its lock is
    taken over once the file system has released it.

    The kernel releases the lock when the process ends, however it ends. Where a file system does not share locks
    between hosts, they compare the file's modification time, which the holder updates. Raises UserError if another
    run holds the lock, or the folder cannot be written. (filelock does not fit: it truncates the file as it opens it,
    and with it the holder's name.)
    """
    made = first_missing(folder)
    file, held = _open(folder), False
    done = threading.Event()
    try:
        _take(file, folder, run=run)
        while not _is_current(file, folder):  # the previous run has just removed its file
            os.close(file)
            file = _open(folder)
            _take(file, folder, run=run)
        held = True
        keeper = threading.Thread(target=_keep_fresh, args=(folder / NAME, done), name="run lock", daemon=True)
        keeper.start()
        yield
    finally:
        done.set()
        if held:
            (folder / NAME).unlink(missing_ok=True)
        os.close(file)
        remove_empty(folder, up_to=made)


def check_free(folder: Path, *, run: str = "") -> None:
    """Raise UserError if another run holds ``folder``. Leaves no trace. run: as of ``run_lock``."""
    with contextlib.suppress(FileNotFoundError):
        try:
            file = os.open(folder / NAME, os.O_RDWR | os.O_NONBLOCK)
        except PermissionError:
            return  # said by whoever wants to write
        try:
            _take(file, folder, run=run, write=False)
        finally:
            os.close(file)


def _open(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise UserError(f"job.dump_folder: {folder} cannot be written: {error.strerror}") from None


def _is_current(file: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), (folder / NAME).stat())
    except FileNotFoundError:
        return False


def _take(file: int, folder: Path, *, run: str, write: bool = True) -> None:
    start = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = _holder(file)
            if time.monotonic() - start > (_LEASE if _is_same_run(holder, run) else _DYING):
                raise _in_use(folder, holder) from None
            time.sleep(0.05)
        except OSError:  # a file system without locks: the file's time has to do
            break
    holder = _holder(file)
    me: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    if run:
        me["run"] = run
    if holder and holder.get("host") != me["host"] and not _is_same_run(holder, run):
        age = max(0.0, time.time() + clock_offset(folder) - os.fstat(file).st_mtime)
        if age < _STALE:
            hint = f"; if it is gone, wait {_STALE - age:.0f} s"
            raise _in_use(folder, holder, f", whose last heartbeat was {age:.0f} s ago{hint}")
    if write:
        os.truncate(file, 0)
        os.pwrite(file, json.dumps(me).encode(), 0)


def _is_same_run(holder: dict[str, Any], run: str) -> bool:
    return bool(run) and holder.get("run") == run


def _holder(file: int) -> dict[str, Any]:
    try:
        found = parse_json(os.pread(file, 4096, 0))
        return found if isinstance(found, dict) else {}
    except ValueError:  # just made
        return {}


def _in_use(folder: Path, holder: dict[str, Any], more: str = "") -> UserError:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    return UserError(f"job.dump_folder: {folder} is in use by another run, {who}{more}; use another --job.dump_folder")


def _keep_fresh(path: Path, done: threading.Event) -> None:
    while not done.wait(_STALE / 6):
        with contextlib.suppress(OSError):
            os.utime(path)
