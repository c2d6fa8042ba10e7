"""A prepared folder: what is in it, whether it is whole, and its rows.

    <folder>/tokenizer/              the tokenizer
    <folder>/train-00000.bin …       token ids and lengths of the documents: see tokenize.py
    <folder>/NAME/train-00000.bin …  the same for each corpus of a mixture
    <folder>/best_fit-512/           for packing = "best_fit": which documents make up which row, see rows.py
    <folder>/data_errors.jsonl       documents that could not be read, if there are any
    <folder>/manifest.json           what it was all made from, and the SHA-256 of every shard; written last

A corpus that is streamed has its held-out tokens here and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import sha256, write_in_one_go

from .packing import Piece, best_fit, pieces_of
from .rows import BestFitRows, ConcatRows, RowSource
from .shards import TokenShards
from .tokenize import PARTS
from .tokenizer import Tokenizer

FORMAT = 2


@dataclass(frozen=True)
class Prepared:
    """What is in a prepared folder."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def names(self) -> list[str]:
        """Names of the corpora; "" if there is only one."""
        return list(self.manifest["corpora"])

    def place(self, name: str) -> Path:
        """The folder of one corpus's shards."""
        return self.folder / name if name else self.folder

    def tokens(self, part: str) -> int:
        """Tokens of all corpora, "train" or "validation"."""
        return sum(corpus["tokens"][part] for corpus in self.manifest["corpora"].values())

    def save(self) -> None:
        """Write the manifest, in one go."""
        write_in_one_go(self.folder / "manifest.json", json.dumps(self.manifest, indent=1) + "\n")

    def fingerprint(self, name: str) -> str:
        """Changes whenever the tokens to train on do."""
        corpus = self.manifest["corpora"][name]
        files = [corpus["files"][file]["sha256"] for file in sorted(corpus["files"]) if file.startswith("train-")]
        # A streamed corpus has no shards: its files stand for what is in them.
        sources = [[source["size"], source["digest"] or source["version"]] for source in corpus["sources"]]
        content = [files or sources, self.manifest["settings"]["corpora"][name]["text_key"]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def problem(self) -> str | None:
        """What is wrong with the folder's files, or None. Those that nobody has written to are not read."""
        if _tokenizer_hash(self.tokenizer) != self.manifest["tokenizer_sha256"]:
            return f"the tokenizer in {self.tokenizer} has changed"
        for name, corpus in self.manifest["corpora"].items():
            for file_name, entry in corpus["files"].items():
                path = self.place(name) / file_name
                try:
                    stat = path.stat()
                except OSError:
                    return f"{path} is missing"
                if stat.st_size != entry["size"]:
                    return f"{path} has {stat.st_size} bytes instead of {entry['size']}"
                if stat.st_mtime_ns != entry["mtime_ns"]:
                    if sha256(path) != entry["sha256"]:
                        return f"{path} has changed"
                    with contextlib.suppress(OSError):  # a copy: it need not be read again next time
                        os.utime(path, ns=(stat.st_atime_ns, entry["mtime_ns"]))
        return None

    def rows(
        self, name: str, part: str, *, seq_len: int, packing: str, say: Callable[[str], None] = lambda line: None
    ) -> RowSource:
        """The rows of one corpus, "train" or "validation". Raises UserError if the corpus has too few tokens.

        say: told what is special.
        """
        tokens, base = self._split(name, part, seq_len, say)
        end_of_text = self.manifest["end_of_text"]
        if packing == "concat":
            return ConcatRows(tokens, seq_len=seq_len, end_of_text=end_of_text)
        folder = self.place(name) / f"best_fit-{seq_len}"
        key = f"{part} {self.fingerprint(name)} {base} {len(tokens)}\n"
        stamp = folder / f"{part}.done"
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != key:
            folder.mkdir(exist_ok=True)
            stamp.unlink(missing_ok=True)
            with (folder / f"{part}.pieces").open("wb") as pieces, (folder / f"{part}.rows").open("wb") as ends:
                count = 0
                for row in self._packed(name, base, base + len(tokens), seq_len):
                    count += len(row)
                    pieces.write(np.array([(start - base, n) for start, n in row], dtype="<i8").tobytes())
                    ends.write(np.array([count], dtype="<i8").tobytes())
            stamp.write_text(key, encoding="utf-8")
        rows = BestFitRows(tokens, folder, part, seq_len=seq_len, end_of_text=end_of_text)
        share = 1 - (len(tokens) - 1) / (rows.num_rows * seq_len)
        of = f" of {name}" if name else ""
        say(f"best_fit: {rows.num_rows:,} {part} rows{of}, {share:.2%} of their positions are padding")
        return rows

    def _split(self, name: str, part: str, seq_len: int, say: Callable[[str], None]) -> tuple[TokenShards, int]:
        """The tokens of a part of a corpus, and where they begin among all its tokens, train before validation.

        With too few documents to hold out whole ones, the end of the corpus is held out instead.
        """
        corpus = self.manifest["corpora"][name]
        fraction = self.manifest["settings"]["validation_fraction"]
        row = seq_len + 1
        counts = {each: corpus["tokens"][each] for each in PARTS}
        shards = self._shards(name)
        streamed = self.manifest["settings"]["streaming"]
        if streamed or (counts["train"] >= row and (fraction == 0 or counts["validation"] >= row)):
            border = counts["train"]
            if streamed and counts["validation"] < row:
                of = f" of {name}" if name else ""
                raise UserError(
                    f"data.validation_fraction: {counts['validation']} tokens are held out in the whole stream{of}, "
                    f"but a row takes {row}; raise it, or set validation.enable = false"
                )
        else:
            total = sum(counts.values())
            end = max(row, int(total * fraction)) if fraction else 0
            if total - end < row:
                also = f", and as many again to hold out (data.validation_fraction = {fraction})" if fraction else ""
                which = f" {name}" if name else ""
                raise UserError(
                    f"training.seq_len: the corpus{which} has only {total} tokens, but a row takes {row}{also}; "
                    "bring more text, or lower training.seq_len"
                )
            border = total - end
            if fraction and part == "validation":
                say(f"too few documents to hold out whole ones: the last {end:,} tokens of the corpus are held out")
        start, stop = (0, border) if part == "train" else (border, len(shards))
        return shards.cut(start, stop), start

    def _shards(self, name: str) -> TokenShards:
        """All tokens of a corpus, train before validation."""
        files = self.manifest["corpora"][name]["files"]
        names = [file for part in PARTS for file in sorted(files) if file.startswith(part) and file.endswith(".bin")]
        dtype = self.manifest["dtype"]
        counts = [files[file]["size"] // np.dtype(dtype).itemsize for file in names]
        return TokenShards([self.place(name) / file for file in names], counts, dtype=dtype)

    def _packed(self, name: str, start: int, stop: int, seq_len: int) -> Iterator[list[Piece]]:
        """Rows of the documents between these tokens, packed shard by shard, so that memory stays bounded."""
        corpus = self.manifest["corpora"][name]
        for part in PARTS:
            at = corpus["tokens"]["train"] if part == "validation" else 0
            for file in sorted(corpus["files"]):
                if not (file.startswith(part) and file.endswith(".index")):
                    continue
                pieces = []
                for length in np.fromfile(self.place(name) / file, dtype="<u4").tolist():
                    first, last = max(at, start), min(at + length, stop - 1)
                    if first < last:
                        pieces += pieces_of(first, last - first, seq_len)
                    at += length
                yield from best_fit(pieces, seq_len)


def read_prepared(folder: Path) -> Prepared | None:
    """What ``folder`` holds, or None if it holds nothing whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return Prepared(folder, manifest) if manifest["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tokenizer_hash(folder: Path) -> str | None:
    try:
        return Tokenizer(folder).fingerprint
    except UserError:
        return None
