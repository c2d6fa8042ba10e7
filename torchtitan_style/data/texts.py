"""The texts of several files, for what needs neither places nor problems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .corpus import SourceFile
from .documents import read_records


def texts_of(files: Sequence[SourceFile], *, text_key: str, max_bytes: int) -> Iterator[str]:
    """The texts of all documents that can be read."""
    for file in files:
        for record in read_records(file, text_key=text_key, max_bytes=max_bytes):
            if not record.problem:
                yield record.text
