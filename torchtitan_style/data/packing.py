"""Which documents go into which row, without cutting those that fit.

A document of n tokens, with the end-of-text in front of it and its own behind it, gives n + 1 pairs of an input
and the label that follows it. A row has room for seq_len pairs. What is longer than a row fills rows of its own
and leaves a rest; documents and rests are then put together (best-fit decreasing; Ding et al. 2024, "Fewer
Truncations Improve Language Modeling", section 3).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Piece(NamedTuple):
    """Consecutive pairs of one document."""

    start: int
    """Its first input, counted over all tokens."""
    pairs: int


def text_lengths(ids: NDArray[Any], end_of_text: int) -> list[int]:
    """Of each text in ``ids`` how long it is with the end-of-text behind it; ``ids`` ends with one. A document that has
    the literal end-of-text in it is several texts."""
    lengths: list[int] = np.diff(np.flatnonzero(ids == end_of_text), prepend=-1).tolist()
    return lengths


def pieces_of(start: int, pairs: int, capacity: int) -> list[Piece]:
    """A document whose first input is ``start``, cut where it is longer than a row."""
    return [Piece(start + at, min(capacity, pairs - at)) for at in range(0, pairs, capacity)]


def best_fit(pieces: Sequence[Piece], capacity: int) -> list[list[Piece]]:
    """Rows of at most ``capacity`` pairs: each piece, the longest first, goes where it leaves the least room.

    Rows come in the order of the first piece that each has, and so do the pieces of a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room and row, sorted
    for index in sorted(range(len(pieces)), key=lambda index: -pieces[index].pairs):
        count = pieces[index].pairs
        place = bisect.bisect_left(free, (count, -1))
        if place == len(free):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = free.pop(place)
        rows[row].append(index)
        if room > count:
            bisect.insort(free, (room - count, row))
    return [[pieces[index] for index in row] for row in sorted(sorted(row) for row in rows)]
