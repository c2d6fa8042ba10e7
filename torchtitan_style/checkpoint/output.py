"""A folder that is complete or not there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from torchtitan_style.errors import UserError

__all__ = ["new_folder"]


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output`` to write into. The caller renames it; what is still there at the end
    is deleted.

    Raises UserError if ``output`` holds something already, or cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists already; name a new folder, or delete it first")
    temporary = output.parent / f"tmp-{output.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
