"""The loss of a model on files of texts or conversations, a document at a time.

Every data-parallel rank scores its share of the documents; the main rank collects the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from torchtitan_style.common.errors import UserError
from torchtitan_style.data.chat.conversations import Conversations
from torchtitan_style.data.chat.samples import Sample
from torchtitan_style.data.encode import ChatRecipe, Encoded, encoder
from torchtitan_style.data.rows import labelled
from torchtitan_style.data.sources.corpus import SourceFile
from torchtitan_style.data.sources.documents import read_records
from torchtitan_style.data.sources.records import EMPTY, PLACE_NAMES, Record
from torchtitan_style.data.tokenizer.tokenizer import token_bytes
from torchtitan_style.distributed.world import World, patient_group
from torchtitan_style.inference.generate import TextModel

from .figures import Document, Sums
from .score import score
from .windows import IGNORE, Window, batches, split_document

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
    chat: ChatRecipe | None = None,
    seq_len: int,
    stride: int,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
    on_document: Callable[[Document], None] = lambda document: None,
    advance: Callable[[int], None] = lambda count: None,
    warn: Callable[[str], None] = lambda line: None,
) -> list[Sums]:
    """The sums of each file, over its documents.

    text_key: field or column with the text. chat: how conversations are read and which of their tokens are scored;
    None: the documents are texts. seq_len, stride: of the windows (windows.py). batch_size: rows of seq_len tokens at
    once, or more shorter ones. share: (k, n) for the k-th of n parts of the documents. on_document: called with each
    that is scored, in no order. advance: told of bytes of the files that are done. warn: told of documents that cannot
    be read, which are left out.

    Raises UserError if a file cannot be read, the tokenizer is not this model's, or has no chat template for ``chat``.
    """
    sums = [Sums() for _ in files]
    done = _Progress(advance)
    fields = text_key if chat is None else Conversations(chat.messages_key)
    sizes = None if chat is None else token_bytes(model.tokenizer)

    def leave_out(number: int, record: Record, problem: str) -> None:
        sums[number].unreadable += 1
        if (count := sum(each.unreadable for each in sums)) <= _WARNINGS:
            warn(f"{files[number].url}: the document at {_place(files[number], record)} is left out: {problem}")
            if count == _WARNINGS:
                warn("further documents that cannot be read are only counted")

    def texts() -> Iterator[tuple[int, Record]]:
        for number, file in enumerate(files):
            part = (share[0] + number) % share[1], share[1]  # files of one document each are dealt out too
            for record in read_records(file, text_key=fields, max_bytes=_LONGEST, share=part):
                if record.problem and record.problem != EMPTY:
                    if record.lost is not None:  # figures of the rest would be of something else
                        raise UserError(f"data.paths: {file.url}: {record.problem}")
                    leave_out(number, record, record.problem)
                elif record.text:
                    yield number, record
                done.read(number, record)

    def windows() -> Iterator[Window[Document]]:
        for number, record, encoded in _encoded(model, texts(), files, chat):
            if not encoded.samples:
                leave_out(number, record, encoded.problem)
                continue
            pairs = [_inputs_and_labels(sample, model.tokenizer.end_of_text) for sample in encoded.samples]
            scored = np.concatenate([labels[labels != IGNORE] for _, labels in pairs])
            size = len(record.text.encode())
            scored_bytes = size if sizes is None else int(sizes[scored].sum())
            document = Document(number, record.index, _place(files[number], record), len(scored), scored_bytes)
            rows = [
                window
                for inputs, labels in pairs
                for window in split_document(
                    inputs.tolist(), labels.tolist(), seq_len=seq_len, stride=stride, source=document
                )
            ]
            document.windows, document.bytes_per_window = len(rows), size / max(len(rows), 1)
            yield from rows

    for window, loss, right in score(model.model, batches(windows(), tokens=batch_size * seq_len), device=model.device):
        document = window.source
        document.loss += loss
        document.right += right
        document.windows -= 1
        if not document.windows:
            sums[document.file].add(document)
            on_document(document)
        done.scored(document)
    return sums


def _place(file: SourceFile, record: Record) -> str:
    """Where a document is in its file, for a person."""
    return f"{record.place_name or PLACE_NAMES[file.format]} {record.place}"


def _inputs_and_labels(sample: Sample, end_of_text: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What a sample is predicted from and what is scored, IGNORE elsewhere. An end-of-text is before a text's first
    token; nothing predicts the first one of a conversation, as in training."""
    ids = sample.ids.astype(np.int64)
    return labelled(np.append(end_of_text, ids) if sample.marks is None else ids, sample.marks)


def _encoded(
    model: TextModel, texts: Iterator[tuple[int, Record]], files: Sequence[SourceFile], chat: ChatRecipe | None
) -> Iterator[tuple[int, Record, Encoded]]:
    """Each document with its samples, or why it has none."""
    waiting: list[tuple[int, Record]] = []
    # Other ids are no problem of one document: they are checked here.
    encode_all = encoder(model.tokenizer, vocab_size=model.tokenizer.num_ids, chat=chat, assets=str(model.assets))

    def encode() -> Iterator[tuple[int, Record, Encoded]]:
        for (number, record), encoded in zip(waiting, encode_all([record.text for _, record in waiting]), strict=True):
            largest = max((int(sample.ids.max(initial=0)) for sample in encoded.samples), default=0)
            if largest >= model.config.vocab_size:
                raise UserError(
                    f"{files[number].url}: it has token id {largest}, but the model's vocabulary has "
                    f"{model.config.vocab_size} tokens; the tokenizer belongs to another model"
                )
            yield number, record, encoded

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

    def scored(self, document: Document) -> None:
        """One of the document's windows is done: its share of what is read and not yet told is about its size."""
        part = min(self._waiting, document.bytes_per_window)
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
