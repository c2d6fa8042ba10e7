"""One call of an entry with one changed file, and what is a fault about how it ended."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import FrameType

from tests.fuzz.entries import ENTRIES, Entry, is_expected
from tests.fuzz.mutations import mutated

SECONDS = 30
"""A call that takes longer is a fault. One takes milliseconds; the machine may be busy."""
LONGEST_MESSAGE = 13_000


class Trial:
    """An entry's folder with its files as they should be."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        memory = Path("/dev/shm")
        self._temporary = tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)
        self.folder = Path(self._temporary.name)
        entry.setup(self.folder)
        self.whole = {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
        if fault := self.run():
            raise AssertionError(f"{entry.name}, unchanged: {fault}")
        self.restore()

    def case(self, random: Random) -> tuple[str, bytes]:
        """A file of the folder, and other content for it."""
        name = random.choice(list(self.entry.files))
        return name, mutated(self.whole[self.folder / name], self.entry.files[name], random)

    def call(self, name: str, content: bytes) -> str | None:
        """Call the entry with ``content`` in the file ``name``. What is wrong with how it ends, or None."""
        (self.folder / name).write_bytes(content)
        try:
            return self.run()
        finally:
            self.restore()

    def run(self) -> str | None:
        """Call the entry."""
        begin = time.monotonic()
        try:
            with _limited(SECONDS), _quiet() as said:
                self.entry.run(self.folder)
            message = said.getvalue()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            if not is_expected(error):
                return _signature(error)
            message = str(error)
        if time.monotonic() - begin > SECONDS:
            return f"takes more than {SECONDS} s"
        return f"a message of {len(message):,} characters" if len(message) > LONGEST_MESSAGE else None

    def restore(self) -> None:
        """Put back what has changed."""
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in self.whole:
                path.unlink()
        for path, content in self.whole.items():
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def close(self) -> None:
        self._temporary.cleanup()


def _signature(error: BaseException) -> str:
    """Kind and place: the same for the same fault."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "torchtitan_style" in frame.filename or "fuzz/entries" in frame.filename]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else "?"
    return f"{type(error).__name__} in {where}: {str(error)[:300]}"


class Endless(BaseException):
    """A call took too long."""


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Endless(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        yield said


def fast_entries() -> list[str]:
    return [name for name, entry in ENTRIES.items() if not entry.slow]
