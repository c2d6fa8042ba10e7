"""Which corpus each row of a mixture comes from: a function of the row's number alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2⁶⁴ divided by the golden ratio."""


def choose(rows: NDArray[np.int64], weights: Sequence[float], key: str) -> NDArray[np.int64]:
    """The number of the corpus that each of ``rows`` is taken from; ``weights`` add up to 1.

    Multiples of the golden ratio, their whole parts dropped, cover 0 … 1 more evenly than random numbers do (the
    three-distance theorem; Knuth, The Art of Computer Programming 3, section 6.4): among any n rows in a row a
    corpus has its share to within a few rows. ``key`` decides where the sequence begins.
    """
    if len(weights) == 1:
        return np.zeros(len(rows), np.int64)
    offset = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8).digest(), dtype="<u8")[0]
    places = rows.astype(np.uint64) * _GOLDEN + offset
    borders = np.array([min(int(border * 2**64), 2**64 - 1) for border in np.cumsum(weights)[:-1]], dtype=np.uint64)
    return np.searchsorted(borders, places, side="right")
