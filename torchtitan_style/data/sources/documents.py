"""The documents of one file, in its order: JSON lines, parquet rows, or pieces of text.

What cannot be read becomes a record with a problem instead of a text, and reading goes on behind it, so
that the same file always gives the same records.
"""

from __future__ import annotations

import json
import lzma
import traceback
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.extensions import SOURCES
from torchtitan_style.common.reading import open_regular

from ..chat.conversations import MESSAGE_LISTS, Conversations
from .corpus import SourceFile
from .json_values import json_values
from .network import is_permanent, wait_before
from .parquet import parquet_column, read_parquet
from .records import (
    EMPTY,
    PIECE,
    Fields,
    Lost,
    Record,
    all_lost,
    checked,
    damaged,
    is_damage,
    open_file,
    text_of,
)
from .signatures import HEAD, layout_of_json, why_not_text

_CONVERT = "one JSON object a line is wanted (jq -c '{}' FILE > FILE.jsonl makes it)"


def read_records(
    file: SourceFile,
    *,
    text_key: Fields,
    max_bytes: int,
    start: int = 0,
    span: tuple[int, int] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Record]:
    """Records of ``file`` from number ``start`` on.

    text_key: field or column with the text, or how a row is read as a conversation. max_bytes: a longer JSON line's
    or parquet row's text is a problem.
    span: only the lines that begin at these bytes (numbered from the first of them), or these row groups. share:
    (k, n) for the k-th of n equal parts: of a parquet file with n row groups or more each n-th group, else each n-th
    record, which costs reading the whole file.

    A network that fails is tried again where it failed. Raises UserError for a local file that cannot be
    opened, RunError for a remote one that cannot be reached for long.
    """
    if why := _no_rows(file, text_key):
        if not start:
            yield why
        return
    reader = _READERS.get(file.format, _read_source)
    failures = 0
    while True:
        try:
            for record in reader(file, text_key, max_bytes, start, span, share):
                yield record
                start, failures = record.index + 1, 0
            return
        except (UserError, ImportError):
            raise
        except Exception as error:
            if file.is_remote and not is_permanent(error):
                failures += 1
                wait_before(failures + 1, file.url, error)
            elif isinstance(error, OSError) or file.is_remote:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"data.paths: {file.url}: cannot be read: {reason}") from None
            else:
                raise


def texts_of(files: Sequence[SourceFile], *, fields: Fields, max_bytes: int) -> Iterator[str]:
    """The texts of all documents that can be read."""
    for file in files:
        for record in read_records(file, text_key=fields, max_bytes=max_bytes):
            if not record.problem:
                yield record.text


def _no_rows(file: SourceFile, fields: Fields) -> Record | None:
    """The problem of a file that holds text, where conversations are wanted."""
    if file.format in ("jsonl", "parquet") or not isinstance(fields, Conversations):
        return None
    return all_lost(
        file, 'a file of text; with data.format = "chat", JSON lines or parquet with conversations are read'
    )


def lost_file(file: SourceFile, text_key: Fields) -> Record | None:
    """The problem of a file that cannot be read at all, as far as its first bytes or its columns tell."""
    if text_file := _no_rows(file, text_key):
        return text_file
    if file.format not in _READERS:
        return None
    try:
        with open_file(file) as (raw, content):
            if file.format == "parquet":
                found = parquet_column(file, raw, text_key)
                return found if isinstance(found, Record) else None
            head: bytes = content.peek(HEAD)[:HEAD]  # type: ignore[attr-defined]
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        return None  # whoever reads it says so
    if file.format == "source":
        return None
    why = why_not_text(head, json_lines=file.format == "jsonl")
    return all_lost(file, why) if why else None


def is_one_piece(file: SourceFile) -> bool:
    """Whether a local file is called one of JSON lines, but is something else, which cannot be read in parts."""
    if file.format != "jsonl":
        return False
    with open_regular(file.url) as content:
        head = content.read(HEAD)
    return layout_of_json(head) != "lines" or bool(why_not_text(head, json_lines=True))


def _read_jsonl(
    file: SourceFile, text_key: Fields, max_bytes: int, start: int, span: tuple[int, int] | None, share: tuple[int, int]
) -> Iterator[Record]:
    longest = 6 * max_bytes + 2**16  # a byte of text takes six as \uXXXX
    begin, end = span or (0, None)
    with open_file(file) as (raw, content):
        if not begin:
            try:
                head: bytes = content.peek(HEAD)[:HEAD]  # type: ignore[attr-defined]
            except Exception as error:
                if not is_damage(error):
                    raise
                yield damaged(file, 0, 1, 0, error)
                return
            if why := why_not_text(head, json_lines=True):
                yield all_lost(file, why)
                return
            if layout_of_json(head) != "lines":
                yield from _read_json(file, raw, content, text_key, max_bytes, start, share)
                return
        offset = begin
        if begin:  # the line that the span begins in belongs to the one before
            content.seek(begin - 1)
            offset += len(content.readline()) - 1
        index = 0
        while end is None or offset < end:
            try:
                line = content.readline(longest)
                skipped = len(line)
                while len(line) == longest and not line.endswith(b"\n") and (more := content.readline(longest)):
                    skipped += len(more)
                    if more.endswith(b"\n"):
                        break
            except Exception as error:
                if not is_damage(error):
                    raise
                yield damaged(file, index, index + 1, raw.tell(), error)
                return
            if not line:
                return
            offset += skipped
            if not index and not begin and (whole := _rows_inside(line, text_key)):
                yield all_lost(file, *whole)
                return
            if index >= start and index % share[1] == share[0]:
                consumed = raw.tell() if file.compression else offset
                text, problem = _parse_line(
                    line if skipped == len(line) else None, text_key, max_bytes, first=not index
                )
                if text or problem:
                    yield Record(index, index + 1, consumed, text, problem)
            index += 1


def _parse_line(line: bytes | None, text_key: Fields, max_bytes: int, *, first: bool) -> tuple[str, str]:
    """Text and problem of one line (None: too long to be read); neither if it is blank."""
    if line is None:
        return "", f"longer than data.max_document_bytes = {max_bytes:,}"
    try:
        decoded = line.decode("utf-8-sig" if first else "utf-8").strip()  # a byte order mark is no text
        if not decoded:
            return "", ""
        record = json.loads(decoded)
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 text: {error}"
    except (ValueError, RecursionError) as error:  # ValueError: numbers of thousands of digits, too
        return "", f"not JSON: {error}"
    return text_of(record, text_key, max_bytes)


def _rows_inside(line: bytes, text_key: Fields) -> tuple[str, int] | None:
    """Problem and rows of a file whose first line is an object with all rows of the corpus in it."""
    if (
        isinstance(text_key, Conversations)
        or len(line) < 2
        or line.count(b"{") < 3
        or not line.startswith((b"{", b"\xef\xbb\xbf{"))
    ):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or text_key in record or record.keys() & set(MESSAGE_LISTS):
        return None
    rows = {name: len(value) for name, value in record.items() if isinstance(value, list) and value}
    name = max(rows, key=lambda name: rows[name], default=None)
    if name is None or not all(isinstance(row, dict) and text_key in row for row in record[name]):
        return None
    return f'one JSON object with {rows[name]:,} rows under "{name}"; {_CONVERT.format(f".{name}[]")}', rows[name]


def _read_json(
    file: SourceFile,
    raw: IO[bytes],
    content: IO[bytes],
    text_key: Fields,
    max_bytes: int,
    start: int,
    share: tuple[int, int],
) -> Iterator[Record]:
    """The elements of a JSON array, or objects that take several lines each."""
    values = json_values(content, piece=PIECE, longest=6 * max_bytes + 2**16)
    index = 0
    while True:
        try:
            value = next(values)
        except StopIteration:
            return
        except Exception as error:
            if not isinstance(error, ValueError) and not is_damage(error):
                raise
            reason = f"not JSON from here on: {error}; {_CONVERT.format('.[]')}"
            if not isinstance(error, ValueError):
                reason = f"the file is damaged or cut short from here on: {error}"
            lost = Lost(None, max(file.size - raw.tell(), 0))
            yield Record(index, index + 1, raw.tell(), problem=reason, lost=lost, place_name="item")
            return
        if index >= start and index % share[1] == share[0]:
            text, problem = text_of(value, text_key, max_bytes)
            yield Record(index, index + 1, raw.tell(), text, problem, place_name="item")
        index += 1


def _read_text(
    file: SourceFile, text_key: Fields, max_bytes: int, start: int, span: tuple[int, int] | None, share: tuple[int, int]
) -> Iterator[Record]:
    errors = "replace" if file.format == "source" else "strict"
    with open_file(file) as (raw, content):
        index = offset = 0
        rest = b""
        while True:
            try:
                block = rest + content.read(PIECE - len(rest))
            except Exception as error:
                if not is_damage(error):
                    raise
                yield damaged(file, index, offset, raw.tell(), error)
                return
            if not block:
                if not index and file.format == "text":  # an empty source file only marks a package
                    yield Record(0, 0, raw.tell(), problem=EMPTY)
                return
            if not index and file.format == "text" and (why := why_not_text(block[:HEAD])):
                yield all_lost(file, why)
                return
            cut = _cut(block)
            piece, rest = block[:cut], block[cut:]
            if index >= start and index % share[1] == share[0]:
                try:
                    text, problem = piece.decode("utf-8" if index else "utf-8-sig", errors), ""
                except UnicodeDecodeError as error:
                    text, problem = "", f"not UTF-8 text: {error}"
                if file.format == "text" and (nuls := text.count("\0")):
                    text, problem = "", f"binary data, not text: {nuls:,} of its bytes are NUL"
                yield Record(index, offset, raw.tell(), text, problem or ("" if text else EMPTY))
            offset += cut
            index += 1


def _cut(block: bytes) -> int:
    """Where to cut a block of text: after its last line, or else between two characters. A short one stays whole."""
    if len(block) < PIECE:
        return len(block)
    if line_end := block.rfind(b"\n") + 1:
        return line_end
    cut = len(block)
    while cut > len(block) - 4 and block[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    return cut - 1 if block[cut - 1] >= 0xC0 else len(block)


def _read_source(
    file: SourceFile, text_key: Fields, max_bytes: int, start: int, span: tuple[int, int] | None, share: tuple[int, int]
) -> Iterator[Record]:
    """By the reader of a registered source. What it raises is a mistake in it."""
    index = -1
    try:
        for index, text in enumerate(SOURCES.get(file.format).read(Path(file.url))):
            if index >= start and index % share[1] == share[0]:
                right, problem = "", f"the source gives a {type(text).__name__}, not text"
                if isinstance(text, str):
                    right, problem = checked(text, max_bytes)
                yield Record(index, index, file.size, right, problem, place_name="document")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f'data.dataset: "{file.format}" cannot read {file.url} after document {index}: {type(error).__name__}: '
            f"{error} ({where.filename}, line {where.lineno})"
        ) from None


_READERS = {"jsonl": _read_jsonl, "parquet": read_parquet, "text": _read_text, "source": _read_text}
"""By ``SourceFile.format``; another format is the name of a registered source."""
