"""Shards of a prepared corpus: token ids, where documents end, and, of conversations, which tokens are trained on.

train-00007.bin     token ids: each text followed by end-of-text; samples of conversations with nothing between them
train-00007.index   tokens of each text with its end-of-text, or of each sample, as uint32
train-00007.marks   of conversations: a byte a token, see chat/samples.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .chat.samples import Sample
from .packing import text_lengths


class ShardWriter:
    """One part, "train" or "validation", of unit ``number``. Open it by ``with``.

    chat: whether its documents are conversations. Of texts, the first shard begins with an end-of-text, so that each
    document has one in front of it.
    """

    def __init__(self, folder: Path, part: str, number: int, *, dtype: str, end_of_text: int, chat: bool) -> None:
        self._path = folder / f"{part}-{number:05d}.bin"
        self._end = np.array([end_of_text], dtype=dtype)
        self._chat, self._first = chat, number == 0 and not chat
        self._lengths: list[int] = []
        self._files: list[BinaryIO] = []
        self.tokens = self.documents = 0

    def __enter__(self) -> ShardWriter:
        self._files = [self._path.open("wb")]
        if self._chat:
            self._files.append(self._path.with_suffix(".marks").open("wb"))
        if self._first:
            self._files[0].write(self._end.tobytes())
            self.tokens = 1
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files:
            file.close()
        self._path.with_suffix(".index").write_bytes(np.array(self._lengths, dtype="<u4").tobytes())

    def add(self, samples: list[Sample]) -> int:
        """Write one document. Returns the tokens that it takes."""
        before = self.tokens
        for sample in samples:
            ids = sample.ids.astype(self._end.dtype)
            if sample.marks is None:
                ids = np.concatenate((ids, self._end))
                self._lengths += text_lengths(ids, int(self._end[0]))
            else:
                self._lengths.append(len(ids))
                self._files[1].write(sample.marks.tobytes())
            self._files[0].write(ids.tobytes())
            self.tokens += len(ids)
        self.documents += 1
        return self.tokens - before


class TokenShards:
    """A corpus as one long sequence: token ids start … stop - 1 of several files in a row, mapped into memory.

    Can be sent to other processes: they map the files anew. marks: beside each file of tokens, ``.bin``, is one with a
    byte for each of them, ``.marks``.
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
