"""The texts of several files, for what needs neither places nor problems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .corpus import SourceFile
from .documents import read_records
from .records import Fields


def texts_of(files: Sequence[SourceFile], *, fields: Fields, max_bytes: int) -> Iterator[str]:
    """The texts of all documents that can be read."""
    for file in files:
        for record in read_records(file, text_key=fields, max_bytes=max_bytes):
            if not record.problem:
                yield record.text
