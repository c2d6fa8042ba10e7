"""Folders that are complete or not there, and what is in a file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import UserError

__all__ = [
    "copy_folder",
    "first_missing",
    "fsync",
    "locked",
    "new_folder",
    "readable_bytes",
    "remove_empty",
    "sha256",
    "write_in_one_go",
]


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One process of this machine at a time; the others wait. ``folder`` need not exist."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"torchtitan_style-{name}.lock"
    try:
        file = os.open(path, os.O_RDONLY)  # another user's, who alone may write to it
    except FileNotFoundError:
        file = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that works on {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def fsync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_in_one_go(path: Path, text: str) -> None:
    """Give a file, new or not, the content ``text``, or leave it as it is: it never has a part of it."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    temporary.replace(path)


def readable_bytes(count: float) -> str:
    """A number of bytes in words, as "86.4 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def first_missing(folder: Path) -> Path | None:
    """The outermost of ``folder`` and its parents that does not exist yet."""
    missing = None
    while not folder.exists():
        missing, folder = folder, folder.parent
    return missing


def remove_empty(folder: Path, *, up_to: Path | None) -> None:
    """Remove ``folder`` and its parents as far as ``up_to``, the outermost that was made, each if nothing is in it:
    others may have put theirs there meanwhile. None: nothing was made."""
    for each in (folder, *folder.parents) if up_to else ():
        try:
            each.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return
        if each == up_to:
            return


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output`` to write into. The caller renames it; otherwise nothing stays behind.

    Raises UserError if ``output`` holds something already, or cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists already; name a new folder, or delete it first")
    temporary = output.parent / f".unfinished-{output.name}"
    made = first_missing(output.parent)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not output.exists():
            remove_empty(output.parent, up_to=made)


def copy_folder(source: Path, target: Path) -> None:
    """Put a copy of ``source`` in the place of ``target``."""
    temporary = target.parent / f"{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def sha256(path: Path, *, advance: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file. advance: called after each MiB. Raises UserError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(2**20):
                digest.update(block)
                advance()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()
