"""The documents of one file, in its order: JSON lines, parquet rows, or pieces of text.

What cannot be read becomes a record with a problem instead of a text, and reading goes on behind it, so
that the same file always gives the same records.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import traceback
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.extensions import SOURCES

from .corpus import SourceFile
from .json_values import json_values
from .network import is_permanent, wait_before
from .signatures import HEAD, layout_of_json, why_not_text

EMPTY = "empty"
"""The problem of a document that is well but holds no text."""
PLACE_NAMES = {"jsonl": "line", "parquet": "row", "text": "byte", "source": "byte"}
"""What ``Record.place`` counts in each format."""
_CONVERSATIONS = {"messages", "conversations", "conversation"}
"""Fields of chat data."""
_CONVERT = "one JSON object a line is wanted (jq -c '{}' FILE > FILE.jsonl makes it)"
PIECE = 2**20
"""Bytes of text in a document at most, about: a longer file is cut at line ends."""


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


def read_records(
    file: SourceFile,
    *,
    text_key: str,
    max_bytes: int,
    start: int = 0,
    span: tuple[int, int] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Record]:
    """Records of ``file`` from number ``start`` on.

    text_key: field or column with the text. max_bytes: a longer JSON line's or parquet row's text is a problem.
    span: only the lines that begin at these bytes (numbered from the first of them), or these row groups. share:
    (k, n) for the k-th of n equal parts: of a parquet file with n row groups or more each n-th group, else each n-th
    record, which costs reading the whole file.

    A network that fails is tried again where it failed. Raises UserError for a local file that cannot be
    opened, RunError for a remote one that cannot be reached for long.
    """
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


@contextlib.contextmanager
def _open(file: SourceFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file as it is, to see how far reading has come, and its content."""
    with contextlib.ExitStack() as stack:
        if file.is_remote:
            import fsspec

            raw: Any = stack.enter_context(fsspec.open(file.url, "rb").open())
            stored: Any = io.BufferedReader(raw, PIECE)  # some servers' files give less than was asked for
        else:
            raw = stored = stack.enter_context(Path(file.url).open("rb"))
        if file.compression == ".zst":
            import pyarrow as pa

            yield raw, io.BufferedReader(pa.CompressedInputStream(stored, "zstd"))
        else:
            openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
            yield raw, openers[file.compression](stored) if file.compression else stored


def _is_damage(error: Exception) -> bool:
    """Whether ``error`` is about a file's content, not about reading it: cut short, or changed."""
    if isinstance(error, EOFError | zlib.error | lzma.LZMAError | gzip.BadGzipFile):
        return True
    return type(error) is OSError and error.errno is None  # what bz2 and pyarrow say


def _damaged(file: SourceFile, index: int, place: int, consumed: int, error: Exception) -> Record:
    lost = Lost(None, max(file.size - consumed, 0))
    return Record(index, place, consumed, problem=f"the file is damaged or cut short from here on: {error}", lost=lost)


def _all_lost(file: SourceFile, problem: str, rows: int | None = None) -> Record:
    """The only record of a file that cannot be read."""
    return Record(0, int(file.format == "jsonl"), file.size, problem=problem, lost=Lost(rows, file.size))


def lost_file(file: SourceFile, text_key: str) -> Record | None:
    """The problem of a file that cannot be read at all, as far as its first bytes or its columns tell."""
    if file.format not in _READERS:
        return None
    try:
        with _open(file) as (raw, content):
            if file.format == "parquet":
                found = _parquet_column(file, raw, text_key)
                return found if isinstance(found, Record) else None
            head: bytes = content.peek(HEAD)[:HEAD]  # type: ignore[attr-defined]
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        return None  # whoever reads it says so
    if file.format == "source":
        return None
    why = why_not_text(head, json_lines=file.format == "jsonl")
    return _all_lost(file, why) if why else None


def is_one_piece(file: SourceFile) -> bool:
    """Whether a local file is called one of JSON lines, but is something else, which cannot be read in parts."""
    if file.format != "jsonl":
        return False
    with Path(file.url).open("rb") as content:
        head = content.read(HEAD)
    return layout_of_json(head) != "lines" or bool(why_not_text(head, json_lines=True))


def _read_jsonl(
    file: SourceFile, text_key: str, max_bytes: int, start: int, span: tuple[int, int] | None, share: tuple[int, int]
) -> Iterator[Record]:
    longest = 6 * max_bytes + 2**16  # a byte of text takes six as \uXXXX
    begin, end = span or (0, None)
    with _open(file) as (raw, content):
        if not begin:
            try:
                head: bytes = content.peek(HEAD)[:HEAD]  # type: ignore[attr-defined]
            except Exception as error:
                if not _is_damage(error):
                    raise
                yield _damaged(file, 0, 1, 0, error)
                return
            if why := why_not_text(head, json_lines=True):
                yield _all_lost(file, why)
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
                if not _is_damage(error):
                    raise
                yield _damaged(file, index, index + 1, raw.tell(), error)
                return
            if not line:
                return
            offset += skipped
            if not index and not begin and (whole := _rows_inside(line, text_key)):
                yield _all_lost(file, *whole)
                return
            if index >= start and index % share[1] == share[0]:
                consumed = raw.tell() if file.compression else offset
                text, problem = _parse_line(
                    line if skipped == len(line) else None, text_key, max_bytes, first=not index
                )
                if text or problem:
                    yield Record(index, index + 1, consumed, text, problem)
            index += 1


def _parse_line(line: bytes | None, text_key: str, max_bytes: int, *, first: bool) -> tuple[str, str]:
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
    return _text_of(record, text_key, max_bytes)


def _text_of(record: Any, text_key: str, max_bytes: int) -> tuple[str, str]:
    """Text and problem of one JSON value."""
    if not isinstance(record, dict):
        return "", "not a JSON object"
    if text_key not in record:
        return "", f'no text under "{text_key}"; it has {", ".join(record)}; {_advice(record, "field")}'
    if record[text_key] is None:
        return "", EMPTY
    if not isinstance(record[text_key], str):
        return "", f'no text under "{text_key}", but a {type(record[text_key]).__name__}'
    return _checked(record[text_key], max_bytes)


def _advice(names: Iterable[str], what: str) -> str:
    """What to do about a document that has ``names``, but not data.text_key."""
    if found := _CONVERSATIONS.intersection(names):
        return (
            f"these are conversations (under {', '.join(sorted(found))}), which are not read: write each as one text, "
            "with its turns marked as the chat template of your tokenizer does"
        )
    return f"data.text_key names the right {what}"


def _rows_inside(line: bytes, text_key: str) -> tuple[str, int] | None:
    """Problem and rows of a file whose first line is an object with all rows of the corpus in it."""
    if len(line) < 2 or line.count(b"{") < 3 or not line.startswith((b"{", b"\xef\xbb\xbf{")):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or text_key in record or _CONVERSATIONS & record.keys():
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
    text_key: str,
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
            if not isinstance(error, ValueError) and not _is_damage(error):
                raise
            reason = f"not JSON from here on: {error}; {_CONVERT.format('.[]')}"
            if not isinstance(error, ValueError):
                reason = f"the file is damaged or cut short from here on: {error}"
            lost = Lost(None, max(file.size - raw.tell(), 0))
            yield Record(index, index + 1, raw.tell(), problem=reason, lost=lost, place_name="item")
            return
        if index >= start and index % share[1] == share[0]:
            text, problem = _text_of(value, text_key, max_bytes)
            yield Record(index, index + 1, raw.tell(), text, problem, place_name="item")
        index += 1


def _checked(text: str, max_bytes: int) -> tuple[str, str]:
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


def _read_parquet(
    file: SourceFile, text_key: str, max_bytes: int, start: int, span: tuple[int, int] | None, share: tuple[int, int]
) -> Iterator[Record]:
    import pyarrow as pa

    with _open(file) as (raw, _):
        found = _parquet_column(file, raw, text_key)
        if isinstance(found, Record):
            if not (span and span[0]):  # once, however many parts the file is read in
                yield found
            return
        parquet, kind = found
        first_row = consumed = 0
        by_group = parquet.num_row_groups >= share[1]
        for group in range(parquet.num_row_groups):
            metadata = parquet.metadata.row_group(group)
            count, first_row = metadata.num_rows, first_row + metadata.num_rows
            others = by_group and group % share[1] != share[0]
            if others or (span and not span[0] <= group < span[1]) or first_row <= start:
                continue
            index = first_row - count
            try:
                for batch in parquet.iter_batches(batch_size=256, row_groups=[group], columns=[text_key]):
                    # As bytes: one value that is no UTF-8 must not take the others with it.
                    values = batch.column(0).cast(kind).cast(pa.large_binary()).to_pylist()
                    for value in values:
                        if index >= start and (by_group or index % share[1] == share[0]):
                            text, problem = _decode(value, max_bytes)
                            done = consumed + metadata.total_byte_size * (index + 1 - first_row + count) // count
                            yield Record(index, index, done, text, problem)
                        index += 1
            except (pa.ArrowException, OSError) as error:
                if not isinstance(error, pa.ArrowException) and not _is_damage(error):
                    raise
                problem = f"rows up to {first_row - 1} are damaged: {_one_line(error)}"
                lost = Lost(first_row - index, metadata.total_byte_size * (first_row - index) // count)
                yield Record(index, index, consumed, problem=problem, lost=lost)
            consumed += metadata.total_byte_size


def _parquet_column(file: SourceFile, raw: IO[bytes], text_key: str) -> Record | tuple[Any, Any]:
    """The open file and the type of its column with the text; or its only record, if there is no such column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(raw)
        schema = parquet.schema_arrow
    except (pa.ArrowInvalid, OSError) as error:
        if not isinstance(error, pa.ArrowInvalid) and not _is_damage(error):
            raise
        return _all_lost(file, f"not a readable parquet file: {_one_line(error)}")
    rows = parquet.metadata.num_rows
    if text_key not in schema.names:
        columns = ", ".join(schema.names)
        return _all_lost(file, f'no column "{text_key}"; it has {columns}; {_advice(schema.names, "one")}', rows)
    kind = schema.types[schema.names.index(text_key)]
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    # Some tools write text as bytes without saying that it is text: each value is checked to be UTF-8.
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(check(kind) for check in checks):
        return _all_lost(file, f'column "{text_key}" does not hold text but {kind}; {_advice([text_key], "one")}', rows)
    return parquet, kind


def _decode(value: bytes | None, max_bytes: int) -> tuple[str, str]:
    try:
        return _checked((value or b"").decode(), max_bytes)
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 text: {error}"


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def parquet_groups(file: SourceFile) -> list[int]:
    """Bytes of each row group of a local file; none if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(file.url)
    except (pa.ArrowException, OSError):
        return []
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def _read_text(
    file: SourceFile, text_key: str, max_bytes: int, start: int, span: tuple[int, int] | None, share: tuple[int, int]
) -> Iterator[Record]:
    errors = "replace" if file.format == "source" else "strict"
    with _open(file) as (raw, content):
        index = offset = 0
        rest = b""
        while True:
            try:
                block = rest + content.read(PIECE - len(rest))
            except Exception as error:
                if not _is_damage(error):
                    raise
                yield _damaged(file, index, offset, raw.tell(), error)
                return
            if not block:
                if not index and file.format == "text":  # an empty source file only marks a package
                    yield Record(0, 0, raw.tell(), problem=EMPTY)
                return
            if not index and file.format == "text" and (why := why_not_text(block[:HEAD])):
                yield _all_lost(file, why)
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
    file: SourceFile, text_key: str, max_bytes: int, start: int, span: tuple[int, int] | None, share: tuple[int, int]
) -> Iterator[Record]:
    """By the reader of a registered source. What it raises is a mistake in it."""
    index = -1
    try:
        for index, text in enumerate(SOURCES.get(file.format).read(Path(file.url))):
            if index >= start and index % share[1] == share[0]:
                right, problem = "", f"the source gives a {type(text).__name__}, not text"
                if isinstance(text, str):
                    right, problem = _checked(text, max_bytes)
                yield Record(index, index, file.size, right, problem, place_name="document")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f'data.dataset: "{file.format}" cannot read {file.url} after document {index}: {type(error).__name__}: '
            f"{error} ({where.filename}, line {where.lineno})"
        ) from None


_READERS = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text, "source": _read_text}
"""By ``SourceFile.format``; another format is the name of a registered source."""
