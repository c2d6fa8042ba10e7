"""One run at a time in a dump folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import first_missing, remove_empty
from torchtitan_style.common.locks import InUse, check_unlocked, lock_file

NAME = "run.lock"


@contextlib.contextmanager
def run_lock(folder: Path, *, run: str = "") -> Iterator[None]:
    """Lock ``folder`` for this process. It is created if needed, and removed again if it is left empty.

    run: the address where the hosts of this run meet; see ``lock_file``. Raises UserError if another run holds the
    lock, or the folder cannot be written.
    """
    made = first_missing(folder)
    try:
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_file(folder / NAME, run=run))
            except InUse as other:
                raise _refusal(folder, other) from None
            except OSError as error:
                raise UserError(f"job.dump_folder: {folder} cannot be written: {error.strerror}") from None
            yield
    finally:
        remove_empty(folder, up_to=made)


def check_free(folder: Path, *, run: str = "") -> None:
    """Raise UserError if another run holds ``folder``. Leaves no trace. run: as of ``run_lock``."""
    try:
        check_unlocked(folder / NAME, run=run)
    except InUse as other:
        raise _refusal(folder, other) from None
    except PermissionError:
        pass  # said by whoever wants to write


def _refusal(folder: Path, other: InUse) -> UserError:
    return UserError(f"job.dump_folder: {folder} is in use by another run, {other}; use another --job.dump_folder")
