"""Rows made from documents while they are read, in an order that ranks and workers do not change.

The corpus is dealt out to a fixed number of streams. Stream k always fills the same rows of every batch, whoever
reads it, and never looks at the others. Where it is, is a few integers: the document that its next row begins in
and how much of that is used. A document goes through the tokenizer again when a run resumes; nothing is stored.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchtitan_style.common.errors import UserError

from .chat.samples import Sample
from .encode import Recipe, is_held_out
from .mixture import choose
from .packing import Piece, best_fit, pieces_of, text_lengths
from .rows import Rows, labelled, permute, with_a_label
from .sources.corpus import SourceFile
from .sources.documents import read_records
from .sources.problems import (
    Problem,
    counted,
    first_few,
    is_allowed,
    is_bad_document,
    is_harmless,
    is_lost,
    lost_files,
    problem_of,
)
from .sources.records import Record
from .tokenizer.tokenizer import Tokenizer

_READ_AHEAD = 16
"""Documents tokenized at once."""
_BLOCK_ROWS = 64
"""Rows' worth of documents that best_fit packs at once."""

Cursor = tuple[int, int, int]
"""Where to go on reading: epoch, place in the epoch's order of files, record of the file."""


@dataclass(frozen=True)
class StreamedCorpus:
    """What all streams over one corpus have in common."""

    name: str
    files: tuple[SourceFile, ...]
    recipe: Recipe
    max_bad_documents: int

    def deal(self, num_streams: int) -> list[list[int]]:
        """The files of each stream, about equally many bytes; all files for each if there are not enough."""
        if len(self.files) < num_streams:
            return [list(range(len(self.files)))] * num_streams
        dealt: list[list[int]] = [[] for _ in range(num_streams)]
        # Each file, the largest first, to the stream that has least; among equals to the first with fewest files.
        least = [(0, 0, stream) for stream in range(num_streams)]
        for number in sorted(range(len(self.files)), key=lambda number: -self.files[number].size):
            size, count, stream = heapq.heappop(least)
            dealt[stream].append(number)
            heapq.heappush(least, (size + self.files[number].size, count + 1, stream))
        return [sorted(files) for files in dealt]


class _Documents:
    """The tokens of the documents that are one stream's part of a corpus, epoch after epoch."""

    def __init__(self, corpus: StreamedCorpus, number: int, num_streams: int, seed: int, tokenizer: Tokenizer) -> None:
        self.corpus, self.number, self.seed = corpus, number, seed
        self.tokenizer, self.encode = tokenizer, corpus.recipe.encoder(tokenizer)
        self.num_streams = num_streams
        self.files = corpus.deal(num_streams)[number]
        self.share = (number, num_streams) if len(corpus.files) < num_streams else (0, 1)
        self.problems: list[Problem] = []
        """What could not be read since somebody last took the list."""
        self._bad: set[tuple[str, int]] = set()

    def read(self, cursor: Cursor) -> Iterator[tuple[Cursor, list[Sample]]]:
        """Documents from ``cursor`` on, each with its own cursor: a text's token ids without end-of-text, or the
        samples of a conversation."""
        epoch, place, record = cursor
        while True:
            found = False
            key = f"{self.seed}/{self.corpus.name}/{self.number}/{epoch}"
            order = permute(np.arange(len(self.files)), size=len(self.files), key=key)
            complete = not (place or record)
            for at in range(place, len(order)):
                for index, samples in self._read_file(self.corpus.files[self.files[order[at]]], record):
                    found = True
                    yield (epoch, at, index), samples
                record = 0
            if complete and not found:
                fewer = "; with fewer (data.num_streams) each has more of them" if self.num_streams > 1 else ""
                stream = f"stream {self.number} of {self.num_streams}"
                raise UserError(
                    f"data: {stream} has no training documents in its files{fewer}{first_few(self.problems)}"
                )
            epoch, place = epoch + 1, 0

    def _read_file(self, file: SourceFile, start: int) -> Iterator[tuple[int, list[Sample]]]:
        recipe = self.corpus.recipe
        batch: list[Record] = []
        records = read_records(
            file, text_key=recipe.fields, max_bytes=recipe.max_document_bytes, start=start, share=self.share
        )
        for record in records:
            if record.problem:
                self._note(file, record)
            elif not is_held_out(record.text, recipe.validation_fraction):
                batch.append(record)
            if len(batch) == _READ_AHEAD:
                yield from self._tokenized(file, batch)
                batch = []
        yield from self._tokenized(file, batch)

    def _tokenized(self, file: SourceFile, batch: list[Record]) -> Iterator[tuple[int, list[Sample]]]:
        for record, encoded in zip(batch, self.encode([record.text for record in batch]), strict=True):
            if encoded.problem:
                self._note(file, dataclasses.replace(record, text="", problem=encoded.problem))
            if encoded.samples:
                yield record.index, [Sample(ids.astype(np.int64), marks) for ids, marks in encoded.samples]

    def _note(self, file: SourceFile, record: Record) -> None:
        problem = problem_of(file, record)
        allowed = self.corpus.recipe.allow_lost_files
        if is_lost(problem) and not is_allowed(file.url, allowed):
            raise lost_files([problem], allowed)
        if is_harmless(problem) or is_lost(problem):
            self.problems.append(problem)
        elif (place := (file.url, record.place)) not in self._bad:  # else met again in a later epoch
            self._bad.add(place)
            self.problems.append(problem)
        if len(self._bad) > self.corpus.max_bad_documents:  # there may be no row, and so nobody to tell, for long
            bad = [problem for problem in self.problems if is_bad_document(problem)]
            raise UserError(
                f"{counted(len(self._bad), 'document')} of one stream cannot be read, and data.max_bad_documents is "
                f"{self.corpus.max_bad_documents}:{first_few(bad)}"
            )


class _Concat:
    """Rows of one document after another, cut at the row's end."""

    def __init__(self, documents: _Documents, state: list[int], seq_len: int) -> None:
        epoch, place, record, self.offset = state
        self.seq_len, self.end_of_text = seq_len, documents.tokenizer.end_of_text
        self.cursor = (epoch, place, record)
        self.reading = documents.read(self.cursor)
        self.held: list[tuple[Cursor, Sample]] = []

    def row(self) -> Rows:
        # Row after row shares a token: the last label of one is the first input of the next.
        missing = self.offset + self.seq_len + 1 - sum(len(sample.ids) for _, sample in self.held)
        while missing > 0:
            cursor, samples = next(self.reading)
            whole = _joined(samples)
            if whole.marks is None:
                whole = Sample(np.concatenate(([self.end_of_text], whole.ids)))
            self.held.append((cursor, whole))
            missing -= len(whole.ids)
        held = _joined([sample for _, sample in self.held])
        row = slice(self.offset, self.offset + self.seq_len + 1)
        marks = None if held.marks is None else held.marks[row]
        self.offset += self.seq_len
        while self.offset >= len(self.held[0][1].ids):
            self.offset -= len(self.held.pop(0)[1].ids)
        return Rows.cut(held.ids[row], marks, seq_len=self.seq_len, end_of_text=self.end_of_text)

    @property
    def state(self) -> list[int]:
        """Cursor of the document that the next row begins in, and how many of its tokens are used."""
        return [*(self.held[0][0] if self.held else self.cursor), self.offset]


class _BestFit:
    """Rows of whole documents, packed block by block."""

    def __init__(self, documents: _Documents, state: list[int], seq_len: int) -> None:
        epoch, place, record, emitted = state
        self.seq_len, self.end_of_text = seq_len, documents.tokenizer.end_of_text
        self.begin = self.end = (epoch, place, record)
        self.reading = documents.read(self.begin)
        self.packed: list[Rows] = []
        self.emitted = 0
        if emitted:
            self._pack()
            self.emitted = min(emitted, len(self.packed))  # of other data the block may have fewer rows

    def row(self) -> Rows:
        if self.emitted == len(self.packed):
            self._pack()
        self.emitted += 1
        return self.packed[self.emitted - 1]

    def _pack(self) -> None:
        self.begin = self.end
        pieces: list[Piece] = []
        block: list[Sample] = []
        end_of_text = np.array([self.end_of_text])
        size = 0
        while size < _BLOCK_ROWS * self.seq_len:
            (epoch, place, record), samples = next(self.reading)
            self.end = (epoch, place, record + 1)
            for ids, marks in samples:
                at = size
                if marks is None:
                    # Offsets count all ids of the block, of which each document has one more than it has pairs.
                    ended = np.concatenate((ids, end_of_text))
                    for length in text_lengths(ended, self.end_of_text):
                        pieces += pieces_of(at, length, self.seq_len)
                        at += length
                    block.append(Sample(np.concatenate((end_of_text, ended))))
                else:
                    pieces.append(Piece(at, min(len(ids), self.seq_len)))
                    block.append(Sample(ids, marks))
                size += len(block[-1].ids)
        whole = _joined(block)
        self.packed = [
            Rows.packed(
                [labelled(*with_a_label(*_slice(whole, at, at + n + 1), n)) for at, n in row],
                seq_len=self.seq_len,
                end_of_text=self.end_of_text,
            )
            for row in best_fit(pieces, self.seq_len)
        ]
        self.emitted = 0

    @property
    def state(self) -> list[int]:
        """Cursor of the first document of the block, and how many of its rows are used."""
        if self.emitted == len(self.packed):
            return [*self.end, 0]
        return [*self.begin, self.emitted]


def _joined(samples: list[Sample]) -> Sample:
    """One after another: all of texts, or all of conversations."""
    marks = [sample.marks for sample in samples if sample.marks is not None]
    return Sample(np.concatenate([sample.ids for sample in samples]), np.concatenate(marks) if marks else None)


def _slice(sample: Sample, start: int, stop: int) -> Sample:
    return Sample(sample.ids[start:stop], None if sample.marks is None else sample.marks[start:stop])


_PACKERS: dict[str, type[_Concat | _BestFit]] = {"concat": _Concat, "best_fit": _BestFit}


class Stream:
    """One stream: its rows, without end, from each corpus of the mixture in turn.

    state: what ``Stream.state`` once was, to go on from there; None to begin.
    """

    def __init__(
        self,
        number: int,
        corpora: list[StreamedCorpus],
        weights: list[float],
        state: dict[str, Any] | None,
        *,
        num_streams: int,
        packing: str,
        seq_len: int,
        seed: int,
        tokenizer: Tokenizer,
    ) -> None:
        self.number, self.weights, self.key = number, weights, f"{seed}/{number}"
        self.rows_taken = [0] * len(corpora) if state is None else list(state["rows"])
        self.documents = [_Documents(corpus, number, num_streams, seed, tokenizer) for corpus in corpora]
        places = [[0, 0, 0, 0]] * len(corpora) if state is None else state["places"]
        self._packers = [
            _PACKERS[packing](documents, place, seq_len)
            for documents, place in zip(self.documents, places, strict=True)
        ]

    def row(self) -> tuple[Rows, int]:
        """The next row, and which corpus it is from."""
        corpus = int(choose(np.array([sum(self.rows_taken)]), self.weights, self.key)[0])
        self.rows_taken[corpus] += 1
        return self._packers[corpus].row(), corpus

    @property
    def state(self) -> dict[str, Any]:
        return {"rows": list(self.rows_taken), "places": [packer.state for packer in self._packers]}

    def take_problems(self) -> list[Problem]:
        """What could not be read since the last time."""
        found = [problem for documents in self.documents for problem in documents.problems]
        for documents in self.documents:
            documents.problems = []
        return found
