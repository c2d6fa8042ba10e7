"""Files and folders that are written whole or not at all, and checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import RunError, UserError
from .reading import open_regular


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_ancestors(folder: Path) -> None:
    """Flush the names on the way to ``folder``: those of folders that were just made are lost in a power cut."""
    for ancestor in folder.absolute().parents:
        with contextlib.suppress(OSError):  # of another user, and not new
            fsync(ancestor)


def refresh_names(folder: Path) -> None:
    """Have this host see which files other hosts have put into ``folder``, and which folder has this name now.

    An NFS client believes for up to a minute what it saw before: that a name is missing, or is that of a file which has
    since been renamed. It asks the server again when a folder is opened.
    """
    for each in (folder.parent, folder):
        with contextlib.suppress(OSError):
            os.close(os.open(each, os.O_RDONLY))


def write_in_one_go(path: Path, text: str) -> None:
    """Write ``text`` to a file atomically: it has the old content or the new one, never a part, and keeps it."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def clock_offset(folder: Path) -> float:
    """Seconds that the clock of the file system of ``folder``, which must exist, is ahead of this host's."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as file:
            return os.fstat(file.fileno()).st_mtime - time.time()
    except OSError:  # said by whoever wants to write
        return 0.0


def readable_bytes(count: float) -> str:
    """A number of bytes in words, as "86.4 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def write_text(path: Path, text: str, *, called: str) -> None:
    """Write what the user asked for. Raises RunError, with the name ``called``, if the system does not let it."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{called}: cannot be written: {error.strerror}") from None


def nearest_existing(path: Path) -> Path:
    """``path``, or the nearest of its parents that exists."""
    return next((each for each in (path, *path.absolute().parents) if each.exists()), Path("/"))


def first_missing(folder: Path) -> Path | None:
    """The outermost of ``folder`` and its parents that does not exist yet."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    return missing[-1] if missing else None


def remove_empty(folder: Path, *, up_to: Path | None) -> None:
    """Remove ``folder`` and its parents up to ``up_to``, the outermost one that was created, as long as they are empty:
    other processes may have created files there. None: none was created."""
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
    """A temporary folder next to ``output`` to write into. The caller renames it; otherwise it is removed.

    Raises UserError if ``output`` exists and is not empty, or cannot be written.
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
    """Replace ``target`` by a copy of ``source``."""
    temporary = target.parent / f"{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def sha256(path: Path, *, advance: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file. advance: called after each MiB. Raises UserError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open_regular(path, buffering=0) as file:
            while block := file.read(2**20):
                digest.update(block)
                advance()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def digest_of(content: Mapping[str, Any], *, but: str = "") -> str:
    """SHA-256 of a JSON object, of which the key ``but`` is left out."""
    rest = {key: value for key, value in content.items() if key != but}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
