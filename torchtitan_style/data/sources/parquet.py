"""Rows of a parquet file, row group by row group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import IO, Any

from torchtitan_style.common.errors import some

from ..chat.conversations import Conversations, NoConversation, without_nulls
from .corpus import SourceFile
from .records import Fields, Lost, Record, advice, all_lost, checked, is_damage, one_line, open_file, text_of


def read_parquet(
    file: SourceFile, text_key: Fields, max_bytes: int, start: int, span: tuple[int, int] | None, share: tuple[int, int]
) -> Iterator[Record]:
    """Its records, as ``read_records`` has them."""
    import pyarrow as pa

    with open_file(file) as (raw, _):
        found = parquet_column(file, raw, text_key)
        if isinstance(found, Record):
            if not (span and span[0]):  # once, however many parts the file is read in
                yield found
            return
        parquet, columns, read_batch = found
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
                for batch in parquet.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                    for row in read_batch(batch):
                        if index >= start and (by_group or index % share[1] == share[0]):
                            text, problem = row(max_bytes)
                            done = consumed + metadata.total_byte_size * (index + 1 - first_row + count) // count
                            yield Record(index, index, done, text, problem)
                        index += 1
            except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
                if not _is_damage(error):
                    raise
                problem = f"rows up to {first_row - 1} are damaged: {one_line(error)}"
                lost = Lost(first_row - index, metadata.total_byte_size * (first_row - index) // max(count, 1))
                yield Record(index, index, consumed, problem=problem, lost=lost)
            consumed += metadata.total_byte_size


def _is_damage(error: Exception) -> bool:
    """Whether ``error``, raised by pyarrow, is about the file's content, not about reading it."""
    import pyarrow as pa

    return isinstance(error, pa.ArrowException | UnicodeDecodeError) or is_damage(error)


Row = Callable[[int], tuple[str, str]]
"""Most bytes → text and problem of a row."""


def parquet_column(
    file: SourceFile, raw: IO[bytes], text_key: Fields
) -> Record | tuple[Any, list[str], Callable[[Any], Iterator[Row]]]:
    """The open file, the columns to read, and how a batch of them is read; or its only record, if they are missing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(raw)
        schema = parquet.schema_arrow
        names = schema.names
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if not _is_damage(error):
            raise
        return all_lost(file, f"not a readable parquet file: {one_line(error)}")
    rows = parquet.metadata.num_rows
    if isinstance(text_key, Conversations):
        try:
            return parquet, text_key.columns(names), functools.partial(_conversations, text_key)
        except NoConversation as error:
            return all_lost(file, str(error), rows)
    if text_key not in names:
        columns = some(names, 20)
        return all_lost(file, f'no column "{text_key}"; it has {columns}; {advice(names, "one")}', rows)
    kind = schema.types[names.index(text_key)]
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    # Some tools write text as bytes without saying that it is text: each value is checked to be UTF-8.
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(check(kind) for check in checks):
        return all_lost(file, f'column "{text_key}" does not hold text but {kind}; {advice([text_key], "one")}', rows)
    return parquet, [text_key], functools.partial(_texts, kind)


def _texts(kind: Any, batch: Any) -> Iterator[Row]:
    import pyarrow as pa

    # As bytes: one value that is no UTF-8 must not take the others with it.
    for value in batch.column(0).cast(kind).cast(pa.large_binary()).to_pylist():
        yield functools.partial(_decode, value)


def _decode(value: bytes | None, max_bytes: int) -> tuple[str, str]:
    try:
        return checked((value or b"").decode(), max_bytes)
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 text: {error}"


def _conversations(fields: Conversations, batch: Any) -> Iterator[Row]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:  # of some row: that one alone is left out
        rows = [batch.slice(number, 1) for number in range(batch.num_rows)]
    for row in rows:
        yield functools.partial(_conversation, fields, row)


def _conversation(fields: Conversations, row: Any, max_bytes: int) -> tuple[str, str]:
    try:
        record = row if isinstance(row, dict) else row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 text: {error}"
    return text_of(without_nulls(record), fields, max_bytes)


def parquet_groups(file: SourceFile) -> list[int]:
    """Bytes of each row group of a local file; none if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(file.url)
    except (pa.ArrowException, UnicodeDecodeError, OSError):
        return []
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
