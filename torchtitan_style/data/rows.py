"""Which rows make up a step: a function of the seed and the step alone.

The token file is cut into rows of seq_len + 1 tokens (each row's last token is the next row's
first, so that every token is predicted once). Rows are numbered on without end: global row g is in
epoch g // R, and each epoch visits the R rows in another order. A step takes the next
global_batch_size rows. How many ranks there are decides only who computes what.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["TokenFile", "batch_hash", "row_order"]

_U64 = np.uint64


class TokenFile:
    """Rows of a file of token ids, mapped into memory."""

    def __init__(self, path: Path, *, dtype: str, seq_len: int) -> None:
        self.ids = np.memmap(path, dtype=dtype, mode="r")
        self.seq_len = seq_len
        self.num_rows = (len(self.ids) - 1) // seq_len

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows by index in the file: [n] → [n, seq_len + 1]."""
        starts = indices[:, None] * self.seq_len
        return self.ids[starts + np.arange(self.seq_len + 1)].astype(np.int64)


def row_order(first: int, count: int, *, num_rows: int, seed: int) -> NDArray[np.int64]:
    """Rows in the file for the global rows first … first + count - 1."""
    global_rows = np.arange(first, first + count, dtype=np.int64)
    epochs, positions = np.divmod(global_rows, num_rows)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = _permute(positions[chosen], size=num_rows, key=f"{seed}/{epoch}")
    return rows


def _permute(positions: NDArray[np.int64], *, size: int, key: str) -> NDArray[np.int64]:
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


def batch_hash(rows: NDArray[np.int64], positions: NDArray[np.int64]) -> int:
    """Hash of some rows of a global batch; the hash of the whole is the sum of its parts' modulo 2⁶⁴.

    rows: [n, seq_len + 1]; positions: [n], each row's place in the global batch. Each row is hashed
    together with its place, so that the sum depends on the order of rows but not on who has which.
    """
    total = 0
    for row, position in zip(np.ascontiguousarray(rows, dtype="<i8"), positions, strict=True):
        digest = hashlib.blake2b(row.tobytes(), digest_size=8, salt=int(position).to_bytes(8, "little"))
        total += int.from_bytes(digest.digest(), "little")
    return total % 2**64
