"""The loss of a model on files of text, a document at a time.

Every data-parallel rank scores its share of the documents; the main rank collects the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from torchtitan_style.common.errors import UserError
from torchtitan_style.data.corpus import SourceFile
from torchtitan_style.data.documents import EMPTY, PLACE_NAMES, Record, read_records
from torchtitan_style.distributed.world import World, patient_group
from torchtitan_style.inference.generate import TextModel

from .figures import Document, Sums
from .score import score
from .windows import Window, batches, split_document

_LONGEST = 2**30
"""Bytes of text in a document at most."""
_WARNINGS = 10
_CHARACTERS_AT_ONCE = 2**20
"""About as much text is tokenized together."""


def evaluate(
    model: TextModel,
    files: Sequence[SourceFile],
    *,
    text_key: str,
    seq_len: int,
    stride: int,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
    on_document: Callable[[Document], None] = lambda document: None,
    advance: Callable[[int], None] = lambda count: None,
    warn: Callable[[str], None] = lambda line: None,
) -> list[Sums]:
    """The sums of each file, over its documents.

    text_key: field or column with the text. seq_len, stride: of the windows (windows.py). batch_size: rows of seq_len
    tokens at once, or more shorter ones. share: (k, n) for the k-th of n parts of the documents. on_document: called
    with each that is scored, in no order. advance: told of bytes of the files that are done. warn: told of documents
    that cannot be read, which are left out.

    Raises UserError if a file cannot be read, or the tokenizer is not this model's.
    """
    sums = [Sums() for _ in files]
    done = _Progress(advance)

    def texts() -> Iterator[tuple[int, Record]]:
        for number, file in enumerate(files):
            part = (share[0] + number) % share[1], share[1]  # files of one document each are dealt out too
            for record in read_records(file, text_key=text_key, max_bytes=_LONGEST, share=part):
                if record.problem and record.problem != EMPTY:
                    if record.lost is not None:  # figures of the rest would be of something else
                        raise UserError(f"{file.url}: {record.problem}")
                    sums[number].unreadable += 1
                    if (count := sum(each.unreadable for each in sums)) <= _WARNINGS:
                        warn(f"{file.url}: the document at {_place(file, record)} is left out: {record.problem}")
                        if count == _WARNINGS:
                            warn("further documents that cannot be read are only counted")
                elif record.text:
                    yield number, record
                done.read(number, record)

    def windows() -> Iterator[Window[Document]]:
        for number, record, ids in _tokenized(model, texts(), files):
            place = _place(files[number], record)
            document = Document(number, record.index, place, len(ids), len(record.text.encode()))
            before = model.tokenizer.end_of_text
            rows = list(split_document(ids, before=before, seq_len=seq_len, stride=stride, source=document))
            document.windows = len(rows)
            yield from rows

    for window, loss, right in score(model.model, batches(windows(), tokens=batch_size * seq_len), device=model.device):
        document = window.source
        document.loss += loss
        document.right += right
        document.windows -= 1
        if not document.windows:
            sums[document.file].add(document)
            on_document(document)
        done.scored(len(window.inputs) - window.context, document)
    return sums


def _place(file: SourceFile, record: Record) -> str:
    """Where a document is in its file, for a person."""
    return f"{record.place_name or PLACE_NAMES[file.format]} {record.place}"


def _tokenized(
    model: TextModel, texts: Iterator[tuple[int, Record]], files: Sequence[SourceFile]
) -> Iterator[tuple[int, Record, list[int]]]:
    """Each text with its token ids, unless it has none."""
    waiting: list[tuple[int, Record]] = []

    def encode() -> Iterator[tuple[int, Record, list[int]]]:
        encoded = model.tokenizer.encode_batch([record.text for _, record in waiting])
        for (number, record), ids in zip(waiting, encoded, strict=True):
            if len(ids) and int(ids.max()) >= model.config.vocab_size:
                raise UserError(
                    f"{files[number].url}: it has token id {int(ids.max())}, but the model's vocabulary has "
                    f"{model.config.vocab_size} tokens; the tokenizer belongs to another model"
                )
            if len(ids):
                yield number, record, ids.tolist()

    characters = 0
    for number, record in texts:
        waiting.append((number, record))
        characters += len(record.text)
        if characters >= _CHARACTERS_AT_ONCE:
            yield from encode()
            waiting, characters = [], 0
    yield from encode()


class _Progress:
    """Bytes of the files that are read, told as they are scored: reading is ahead of that."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._file, self._consumed = advance, -1, 0
        self._waiting = 0.0

    def read(self, file: int, record: Record) -> None:
        self._waiting += record.consumed - (self._consumed if file == self._file else 0)
        self._file, self._consumed = file, record.consumed

    def scored(self, tokens: int, document: Document) -> None:
        """A document's share of what is read and not yet told is about its size."""
        part = min(self._waiting, tokens * document.bytes / document.tokens)
        self._waiting -= part
        self._advance(round(part))


def gather(world: World | None, sums: list[Sums], documents: list[Document]) -> tuple[list[Sums], list[Document]]:
    """Sums and documents of all ranks, in the files' order; complete on the main rank only."""
    if world is not None and world.layout.dp > 1:
        group = patient_group()  # some ranks are done much earlier
        found: list[Any] = [None] * dist.get_world_size()
        mine = (sums, documents) if world.counts else ([Sums() for _ in sums], [])
        dist.gather_object(mine, found if world.is_main else None, group=group)
        if world.is_main:
            sums = [sum((part[number] for part, _ in found), Sums()) for number in range(len(sums))]
            documents = [document for _, part in found for document in part]
    return sums, sorted(documents, key=lambda document: (document.file, document.index))
