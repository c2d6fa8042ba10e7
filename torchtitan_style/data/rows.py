"""Rows of a prepared corpus, in an order that depends on the seed and on how many rows were taken before.

Rows are numbered on without end: global row g is in epoch g // R, and each epoch visits the R rows in another
order. A step takes the next global_batch_size rows. How many ranks there are decides only who computes what.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .chat.samples import BEGINS, TRAINED
from .shards import TokenShards

_U64 = np.uint64
NO_LABEL = -100
"""The label of a position that has nothing to predict: padding, and tokens that are not trained on."""
PADDING = -1
"""The document of padding, where rows are packed."""


@dataclass(frozen=True)
class Rows:
    """Some rows, each array [n, seq_len] of int64."""

    inputs: NDArray[np.int64]
    labels: NDArray[np.int64]
    """The token after each input; NO_LABEL at padding, and where that token is not trained on."""
    documents: NDArray[np.int64]
    """Which document of its row each position belongs to, counted up from the left; PADDING."""

    @classmethod
    def join(cls, parts: list[Rows]) -> Rows:
        """All rows of ``parts``, in order."""
        fields = ("inputs", "labels", "documents")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))

    @classmethod
    def packed(
        cls, pieces: list[tuple[NDArray[np.int64], NDArray[np.int64]]], *, seq_len: int, end_of_text: int
    ) -> Rows:
        """One row of ``pieces``, the inputs and labels of a document each, and padding behind them."""
        inputs, labels = np.full((1, seq_len), end_of_text), np.full((1, seq_len), NO_LABEL)
        documents = np.full((1, seq_len), PADDING)
        at = 0
        for number, (piece_inputs, piece_labels) in enumerate(pieces):
            end = at + len(piece_inputs)
            inputs[0, at:end], labels[0, at:end], documents[0, at:end] = piece_inputs, piece_labels, number
            at = end
        return cls(inputs, labels, documents)

    @classmethod
    def cut(
        cls, ids: NDArray[np.int64], marks: NDArray[np.uint8] | None = None, *, seq_len: int, end_of_text: int
    ) -> Rows:
        """One row of up to seq_len + 1 consecutive tokens. Of texts, an end-of-text begins a document: from it the next
        document's first token is predicted. Of conversations, the marks say where one begins."""
        row = cls.packed([labelled(ids, marks)], seq_len=seq_len, end_of_text=end_of_text)
        begins = row.inputs == end_of_text
        if marks is not None:
            begins[0, : len(marks) - 1] = marks[:-1] & BEGINS
        return cls(row.inputs, row.labels, np.where(row.documents == PADDING, PADDING, np.cumsum(begins, axis=1)))

    def take(self, indices: NDArray[np.integer]) -> Rows:
        """These of the rows, in this order."""
        return Rows(self.inputs[indices], self.labels[indices], self.documents[indices])

    @property
    def positions(self) -> NDArray[np.int64]:
        """Of each token, counted from the first of its document, [n, seq_len]."""
        t = np.arange(self.documents.shape[1])
        begins = np.diff(self.documents, axis=1, prepend=-2) != 0  # documents are numbered from -1
        return t - np.maximum.accumulate(np.where(begins, t, 0), axis=1)

    @property
    def padding(self) -> int:
        """Positions that are padding."""
        return int((self.documents == PADDING).sum())


def labelled(ids: NDArray[np.int64], marks: NDArray[np.uint8] | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The inputs among consecutive tokens, all but the last, and their labels."""
    inputs, labels = ids[:-1], ids[1:]
    return inputs, labels if marks is None else np.where(marks[1:] & TRAINED, labels, NO_LABEL)


def with_a_label(
    ids: NDArray[np.int64], marks: NDArray[np.uint8] | None, count: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8] | None]:
    """``count`` inputs and one token more, which the last sample of conversations has not: nothing is predicted."""
    if marks is None or len(ids) > count:
        return ids, marks
    return np.append(ids, 0), np.append(marks, np.uint8(BEGINS))


class RowSource(Protocol):
    """A corpus's rows by number."""

    num_rows: int

    def rows(self, indices: NDArray[np.int64]) -> Rows:
        """The rows of these numbers, 0 … num_rows - 1."""
        ...


class ConcatRows:
    """The corpus cut into rows of seq_len + 1 tokens, each row's last token being the next one's first, so that
    every token is predicted once. The last row may have padding."""

    def __init__(self, tokens: TokenShards, *, seq_len: int, end_of_text: int) -> None:
        self.tokens, self.seq_len, self.end_of_text = tokens, seq_len, end_of_text
        self.num_rows = -(-(len(tokens) - 1) // seq_len)

    def rows(self, indices: NDArray[np.int64]) -> Rows:
        size = self.seq_len
        places = [int(index) * size for index in indices]
        parts = [(self.tokens.read(at, size + 1), self.tokens.read_marks(at, size + 1)) for at in places]
        return Rows.join([Rows.cut(ids, marks, seq_len=size, end_of_text=self.end_of_text) for ids, marks in parts])


class BestFitRows:
    """Rows of whole documents, as ``packing.best_fit`` has put them together.

    num_positions: those that are not padding. folder: with ``<part>.pieces``, start and count of every piece as two
    int64, and ``<part>.rows``, the number of pieces up to the end of every row as int64.
    """

    def __init__(self, tokens: TokenShards, folder: Path, part: str, *, seq_len: int, end_of_text: int) -> None:
        self.tokens, self.folder, self.part = tokens, folder, part
        self.seq_len, self.end_of_text = seq_len, end_of_text
        self._open()
        self.num_rows = len(self._ends)
        self.num_positions = int(self._pieces[:, 1].sum())

    def _open(self) -> None:
        self._pieces = np.memmap(self.folder / f"{self.part}.pieces", dtype="<i8", mode="r").reshape(-1, 2)
        self._ends = np.memmap(self.folder / f"{self.part}.rows", dtype="<i8", mode="r")

    def rows(self, indices: NDArray[np.int64]) -> Rows:
        parts = []
        for index in indices:
            first = int(self._ends[index - 1]) if index else 0
            pairs = []
            for start, count in self._pieces[first : int(self._ends[index])].tolist():
                ids, marks = self.tokens.read(start, count + 1), self.tokens.read_marks(start, count + 1)
                pairs.append(labelled(*with_a_label(ids, marks, count)))
            parts.append(Rows.packed(pairs, seq_len=self.seq_len, end_of_text=self.end_of_text))
        return Rows.join(parts)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_pieces", "_ends")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()


def row_order(global_rows: NDArray[np.int64], *, num_rows: int, key: str) -> NDArray[np.int64]:
    """The corpus's rows for these global rows. ``key``: seed and name of the corpus; another one, another order."""
    epochs, positions = np.divmod(global_rows, num_rows)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = permute(positions[chosen], size=num_rows, key=f"{key}/{epoch}")
    return rows


def permute(positions: NDArray[np.int64], *, size: int, key: str) -> NDArray[np.int64]:
    """A permutation of 0 … size - 1, picked by ``key``, applied to ``positions``. Needs no table.

    A Feistel network permutes the numbers of an even number of bits (Luby & Rackoff 1988); results
    outside of 0 … size - 1 go through it again until they are inside (Black & Rogaway 2002, "cycle
    walking"), at most four times on average.
    """
    half = _U64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (_U64(1) << half) - _U64(1)
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=64).digest(), dtype="<u8")

    def network(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> half, x & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        return (left << half) | right

    values = network(positions.astype(_U64))
    while (outside := values >= _U64(size)).any():
        values[outside] = network(values[outside])
    return values.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scatter the bits of each number: the finaliser of SplitMix64 (Steele et al. 2014, figure 17)."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def batch_hash(rows: Rows, positions: NDArray[np.int64]) -> int:
    """Hash of some rows of a global batch; the hash of the whole is the sum of its parts' modulo 2⁶⁴.

    positions: [n], each row's place in the global batch. Inputs and labels of each row are hashed
    together with its place, so that the sum depends on the order of rows but not on who has which.
    """
    total = 0
    pairs = np.ascontiguousarray(np.concatenate((rows.inputs, rows.labels), axis=1), dtype="<i8")
    for row, position in zip(pairs, positions, strict=True):
        digest = hashlib.blake2b(row.tobytes(), digest_size=8, salt=int(position).to_bytes(8, "little"))
        total += int.from_bytes(digest.digest(), "little")
    return total % 2**64
