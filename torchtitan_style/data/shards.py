"""The prepared corpus as one long sequence of token ids, mapped into memory shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class TokenShards:
    """Token ids start … stop - 1 of several files in a row. Can be sent to other processes: they map the files anew."""

    def __init__(
        self, paths: Sequence[Path], counts: Sequence[int], *, dtype: str, start: int = 0, stop: int | None = None
    ) -> None:
        self.paths, self.counts, self.dtype = list(paths), list(counts), dtype
        self.ends = np.cumsum([0, *counts])
        self.start, self.stop = start, int(self.ends[-1]) if stop is None else stop
        self._maps: dict[int, NDArray[np.integer]] = {}

    def __len__(self) -> int:
        return self.stop - self.start

    def cut(self, start: int, stop: int) -> TokenShards:
        """A part of these tokens."""
        return TokenShards(self.paths, self.counts, dtype=self.dtype, start=self.start + start, stop=self.start + stop)

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """``count`` token ids from ``start`` on; fewer at the end."""
        start += self.start
        stop = min(start + count, self.stop)
        parts = []
        while start < stop:
            shard = int(np.searchsorted(self.ends, start, side="right")) - 1
            upto = min(stop, int(self.ends[shard + 1]))
            parts.append(self._map(shard)[start - self.ends[shard] : upto - self.ends[shard]])
            start = upto
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def _map(self, shard: int) -> NDArray[np.integer]:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.paths[shard], dtype=self.dtype, mode="r")
        return self._maps[shard]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_maps": {}}
