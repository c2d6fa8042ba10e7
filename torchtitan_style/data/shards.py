"""The prepared corpus as one long sequence of token ids, mapped into memory shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class TokenShards:
    """Token ids start … stop - 1 of several files in a row. Can be sent to other processes: they map the files anew.

    marks: beside each file of tokens, ``.bin``, is one with a byte for each of them, ``.marks``.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        counts: Sequence[int],
        *,
        dtype: str,
        marks: bool = False,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self.paths, self.counts, self.dtype, self.marks = list(paths), list(counts), dtype, marks
        self.ends = np.cumsum([0, *counts])
        self.start, self.stop = start, int(self.ends[-1]) if stop is None else stop
        self._maps: dict[Path, NDArray[np.integer]] = {}

    def __len__(self) -> int:
        return self.stop - self.start

    def cut(self, start: int, stop: int) -> TokenShards:
        """A part of these tokens."""
        begin = self.start
        return TokenShards(
            self.paths, self.counts, dtype=self.dtype, marks=self.marks, start=begin + start, stop=begin + stop
        )

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """``count`` token ids from ``start`` on; fewer at the end."""
        return np.concatenate([np.empty(0, np.int64), *self._parts(start, count, ".bin", self.dtype)])

    def read_marks(self, start: int, count: int) -> NDArray[np.uint8] | None:
        """The marks of these tokens; None if there are none."""
        if not self.marks:
            return None
        return np.concatenate([np.empty(0, np.uint8), *self._parts(start, count, ".marks", "u1")])

    def _parts(self, start: int, count: int, suffix: str, dtype: str) -> Iterator[NDArray[np.integer]]:
        start += self.start
        stop = min(start + count, self.stop)
        while start < stop:
            shard = int(np.searchsorted(self.ends, start, side="right")) - 1
            upto = min(stop, int(self.ends[shard + 1]))
            values = self._map(self.paths[shard].with_suffix(suffix), dtype)
            yield values[start - self.ends[shard] : upto - self.ends[shard]]
            start = upto

    def _map(self, path: Path, dtype: str) -> NDArray[np.integer]:
        if path not in self._maps:
            self._maps[path] = np.memmap(path, dtype=dtype, mode="r")
        return self._maps[path]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_maps": {}}
