"""Writing one shard: token ids, where documents end, and, of conversations, which tokens are trained on.

train-00007.bin     token ids: each text followed by end-of-text; samples of conversations with nothing between them
train-00007.index   tokens of each text with its end-of-text, or of each sample, as uint32
train-00007.marks   of conversations: a byte a token, see chat/samples.py
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

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
