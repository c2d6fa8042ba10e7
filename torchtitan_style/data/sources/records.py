"""A document of a file, what is wrong with it, and the file itself, whatever its format."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from torchtitan_style.common.errors import cut, shown, some
from torchtitan_style.common.reading import open_regular
from torchtitan_style.config.schema import Corpus

from ..chat.conversations import MESSAGE_LISTS, Conversations, NoConversation
from .corpus import SourceFile

EMPTY = "empty"
"""The problem of a document that is well but holds no text."""
PLACE_NAMES = {"jsonl": "line", "parquet": "row", "text": "byte", "source": "byte"}
"""What ``Record.place`` counts in each format."""
PIECE = 2**20
"""Bytes of text in a document at most, about: a longer file is cut at line ends."""
Fields = str | Conversations
"""What of a row is its document: the text of the field or column of this name, or a conversation."""


class Lost(NamedTuple):
    """How much of a file is lost with one problem: all of it, or what is behind some point."""

    rows: int | None
    """None: not known."""
    bytes: int
    """Of the file as it is stored; 0: not known."""


@dataclass(frozen=True)
class Record:
    """One document, or the place of one that cannot be read."""

    index: int
    """Its number in the file, from 0."""
    place: int
    """Where it is, for a person: line (from 1), row (from 0) or byte."""
    consumed: int
    """Bytes of the file read up to its end, about."""
    text: str = ""
    problem: str = ""
    lost: Lost | None = None
    """None: one document at most."""
    place_name: str = ""
    """What ``place`` counts, where it is not what ``PLACE_NAMES`` says."""


def fields_of(corpus: Corpus) -> Fields:
    """The field or column with the text, or how a row is read as a conversation."""
    return Conversations(corpus.messages_key) if corpus.format == "chat" else corpus.text_key


@contextlib.contextmanager
def open_file(file: SourceFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file as it is, to see how far reading has come, and its content."""
    with contextlib.ExitStack() as stack:
        if file.is_remote:
            import fsspec

            raw: Any = stack.enter_context(fsspec.open(file.url, "rb").open())
            stored: Any = io.BufferedReader(raw, PIECE)  # some servers' files give less than was asked for
        else:
            raw = stored = stack.enter_context(open_regular(file.url))
        if file.compression == ".zst":
            yield raw, io.BufferedReader(_Zstandard(stored))
        else:
            openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
            yield raw, openers[file.compression](stored) if file.compression else stored


class _Zstandard(io.RawIOBase):
    """The content of a zstandard file. Of one that is cut short, all that can be had of it.

    Arrow's reader drops what it has decoded of a read when that meets damage. Where that happens, the file is read
    again up to there, and on in smaller pieces, the last of a byte each.
    """

    def __init__(self, stored: IO[bytes]) -> None:
        self._stored, self._read, self._at_once = stored, 0, 2**16
        self._before: list[Any] = []
        """Streams that are not used any more: freed, they would close the file."""
        self._begin()

    def _begin(self) -> None:
        import pyarrow as pa

        self._stream = pa.CompressedInputStream(self._stored, "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                data = self._stream.read(min(len(buffer), self._at_once))
                break
            except OSError as error:
                if self._at_once == 1 or not is_damage(error) or not self._stored.seekable():
                    raise
                self._at_once = max(self._at_once // 256, 1)
                self._before.append(self._stream)
                self._stored.seek(0)
                self._begin()
                left = self._read
                while left:
                    left -= len(self._stream.read(min(left, 2**16)))
        self._read += len(data)
        buffer[: len(data)] = data
        return len(data)


def is_damage(error: Exception) -> bool:
    """Whether ``error`` is about a file's content, not about reading it: cut short, or changed."""
    if isinstance(error, EOFError | zlib.error | lzma.LZMAError | gzip.BadGzipFile):
        return True
    return type(error) is OSError and error.errno is None  # what bz2 and pyarrow say


def damaged(file: SourceFile, index: int, place: int, consumed: int, error: Exception) -> Record:
    lost = Lost(None, max(file.size - consumed, 0))
    return Record(index, place, consumed, problem=f"the file is damaged or cut short from here on: {error}", lost=lost)


def all_lost(file: SourceFile, problem: str, rows: int | None = None) -> Record:
    """The only record of a file that cannot be read."""
    return Record(0, int(file.format == "jsonl"), file.size, problem=problem, lost=Lost(rows, file.size))


def text_of(record: Any, text_key: Fields, max_bytes: int) -> tuple[str, str]:
    """Text and problem of one row."""
    if not isinstance(record, dict):
        return "", "not a JSON object"
    if isinstance(text_key, Conversations):
        try:
            return checked(text_key.text_of(record), max_bytes)
        except NoConversation as error:
            return "", cut(str(error), 1000)
        except RecursionError:
            return "", "nested too deep"
    if text_key not in record:
        return "", f'no text under "{text_key}"; it has {some(record, 20)}; {advice(record, "field")}'
    if record[text_key] is None:
        return "", EMPTY
    if not isinstance(record[text_key], str):
        return "", f'no text under "{text_key}", but {shown(record[text_key])}'
    return checked(record[text_key], max_bytes)


def advice(names: Iterable[str], what: str) -> str:
    """What to do about a document that has ``names``, but not data.text_key."""
    if found := set(MESSAGE_LISTS).intersection(names):
        return f'these are conversations (under {", ".join(sorted(found))}): data.format = "chat" reads them'
    return f"data.text_key names the right {what}"


def checked(text: str, max_bytes: int) -> tuple[str, str]:
    """A text and what is wrong with it."""
    if not text:
        return "", EMPTY
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        return "", f"not Unicode text: {error}"
    if size > max_bytes:
        return "", f"{size:,} bytes of text, more than data.max_document_bytes = {max_bytes:,}"
    return text, ""


def one_line(error: Exception) -> str:
    return cut(str(error).strip().partition("\n")[0], 300)
