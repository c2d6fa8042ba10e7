"""A prepared folder: what is in it, whether it is whole, and its rows.

    <folder>/tokenizer/              the tokenizer
    <folder>/train-00000.bin …       token ids and lengths of the documents: see data/shards.py
    <folder>/NAME/train-00000.bin …  the same for each corpus of a mixture
    <folder>/best_fit-512/           for packing = "best_fit": which documents make up which row, see row_tables.py
    <folder>/data_errors.jsonl       documents that could not be read, if there are any
    <folder>/manifest.json           what it was all made from, and the SHA-256 of every shard; written last

A corpus that is streamed has its held-out tokens here and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from torchtitan_style.common.errors import UserError, shown
from torchtitan_style.common.files import digest_of, sha256, write_in_one_go
from torchtitan_style.common.reading import read_json_object
from torchtitan_style.common.typed import Content, Count, Sha256, typed

from ..chat.template import ChatTemplate
from ..encode import PARTS
from ..packing import Piece, best_fit, pieces_of
from ..rows import BestFitRows, ConcatRows, RowSource
from ..shards import TokenShards
from ..sources.problems import counted
from ..tokenizer.tokenizer import Tokenizer
from .row_tables import tables_problem, write_tables

FORMAT = 3
_MOST_BYTES = 2**28
"""Size of a manifest at most: it has a line for every file of the corpus."""


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

    def is_chat(self, name: str) -> bool:
        """Whether a corpus is one of conversations."""
        return bool(self.manifest["settings"]["corpora"][name].get("format") == "chat")

    def place(self, name: str) -> Path:
        """The folder of one corpus's shards."""
        return self.folder / name if name else self.folder

    def tokens(self, part: str) -> int:
        """Tokens of all corpora, "train" or "validation"."""
        return sum(corpus["tokens"][part] for corpus in self.manifest["corpora"].values())

    def save(self) -> None:
        """Write the manifest, in one go."""
        self.manifest["manifest_sha256"] = _hash_of(self.manifest)
        write_in_one_go(self.folder / "manifest.json", json.dumps(self.manifest, indent=1) + "\n")

    def fingerprint(self, name: str) -> str:
        """Changes whenever the tokens to train on do."""
        corpus = self.manifest["corpora"][name]
        files = [corpus["files"][file]["sha256"] for file in sorted(corpus["files"]) if file.startswith("train-")]
        # A streamed corpus has no shards: its files stand for what is in them.
        sources = [[source["size"], source["digest"] or source["version"]] for source in corpus["sources"]]
        settings = self.manifest["settings"]["corpora"][name]
        content = [files or sources, settings["text_key"]]
        if self.is_chat(name):
            content += [settings["messages_key"], settings["train_on"], self.manifest["chat_template"]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def problem(self) -> str | None:
        """What is wrong with the folder's files, or None. Those that nobody has written to are not read."""
        if _tokenizer_hash(self.tokenizer) != self.manifest["tokenizer_sha256"]:
            return f"the tokenizer in {self.tokenizer} has changed"
        if "chat_template" in self.manifest and template_hash(self.tokenizer) != self.manifest["chat_template"]:
            return f"the chat template in {self.tokenizer} has changed"
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
        self,
        name: str,
        part: str,
        *,
        seq_len: int,
        packing: str,
        least: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ) -> RowSource:
        """The rows of one corpus, "train" or "validation". Raises UserError if the corpus has too few tokens.

        least: tokens that it must have; 0: a row. say: told what is special. Tables of packed rows that are not as they
        were written are made anew.
        """
        tokens, base = self._split(name, part, least or seq_len + 1, say)
        end_of_text = self.manifest["end_of_text"]
        if packing == "concat":
            return ConcatRows(tokens, seq_len=seq_len, end_of_text=end_of_text)
        folder = self.place(name) / f"best_fit-{seq_len}"
        key = f"{part} {self.fingerprint(name)} {base} {len(tokens)}"
        if (problem := tables_problem(folder, part, key)) is not None:
            if problem:
                say(f"packing rows again: {problem}")
            write_tables(folder, part, key, self._packed(name, base, base + len(tokens), seq_len), base=base)
        rows = BestFitRows(tokens, folder, part, seq_len=seq_len, end_of_text=end_of_text)
        share = 1 - rows.num_positions / (rows.num_rows * seq_len)
        of = f" of {name}" if name else ""
        say(f"best_fit: {rows.num_rows:,} {part} rows{of}, {share:.2%} of their positions are padding")
        return rows

    def _split(self, name: str, part: str, row: int, say: Callable[[str], None]) -> tuple[TokenShards, int]:
        """The tokens of a part of a corpus, and where they begin among all its tokens, train before validation.

        row: how many it has at least.
        With too few documents to hold out whole ones, the end of the corpus is held out instead.
        """
        if self.is_chat(name):
            return self._split_samples(name, part, say)
        corpus = self.manifest["corpora"][name]
        fraction = self.manifest["settings"]["validation_fraction"]
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
                    "add text, or lower training.seq_len"
                )
            border = total - end
            if fraction and part == "validation":
                say(f"too few documents to hold out whole ones: the last {end:,} tokens of the corpus are held out")
        start, stop = (0, border) if part == "train" else (border, len(shards))
        return shards.cut(start, stop), start

    def _split_samples(self, name: str, part: str, say: Callable[[str], None]) -> tuple[TokenShards, int]:
        """The same for a corpus of conversations, of which each sample stays whole."""
        corpus, settings = self.manifest["corpora"][name], self.manifest["settings"]
        fraction, of = settings["validation_fraction"], f" of {name}" if name else ""
        shards, border = self._shards(name), corpus["tokens"]["train"]
        if settings["streaming"] and not corpus["tokens"]["validation"]:
            raise UserError(
                f"data.validation_fraction: no conversation is held out in the whole stream{of}; raise it, or set "
                "validation.enable = false"
            )
        if not settings["streaming"] and (not border or (fraction and not corpus["tokens"]["validation"])):
            begins = np.cumsum([0, *(length for each in PARTS for length in self._lengths(name, each))]).tolist()[:-1]
            if len(begins) < 1 + bool(fraction):
                raise UserError(
                    f"data.paths: the corpus{of} has one conversation only, and one must be held out; add more, or "
                    "set validation.enable = false"
                )
            wanted = int(len(shards) * (1 - fraction))
            border = max((at for at in begins if at <= wanted), default=0) or begins[1] if fraction else len(shards)
            if fraction and part == "validation":
                held = f"the last {len(shards) - border:,} tokens of the corpus are held out"
                say(f"too few conversations to hold out whole ones: {held}")
        start, stop = (0, border) if part == "train" else (border, len(shards))
        return shards.cut(start, stop), start

    def _lengths(self, name: str, part: str) -> list[int]:
        """Tokens of each document of a part, shard by shard."""
        files = sorted(self.manifest["corpora"][name]["files"])
        names = [file for file in files if file.startswith(part) and file.endswith(".index")]
        return [length for file in names for length in np.fromfile(self.place(name) / file, dtype="<u4").tolist()]

    def _shards(self, name: str) -> TokenShards:
        """All tokens of a corpus, train before validation."""
        files = self.manifest["corpora"][name]["files"]
        names = [file for part in PARTS for file in sorted(files) if file.startswith(part) and file.endswith(".bin")]
        dtype = self.manifest["dtype"]
        counts = [files[file]["size"] // np.dtype(dtype).itemsize for file in names]
        paths = [self.place(name) / file for file in names]
        return TokenShards(paths, counts, dtype=dtype, marks=self.is_chat(name))

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
                    if self.is_chat(name):
                        pieces += [Piece(at, min(length, seq_len))] if start <= at < stop else []
                    elif (first := max(at, start)) < (last := min(at + length, stop - 1)):
                        pieces += pieces_of(first, last - first, seq_len)
                    at += length
                yield from best_fit(pieces, seq_len)


class _File(Content):
    size: Count
    mtime_ns: int = Field(ge=-(2**63), lt=2**63)
    sha256: Sha256


class _Source(Content):
    url: str
    size: Count
    version: str
    digest: str


class _Corpus(Content):
    documents: dict[str, Count]
    tokens: dict[str, Count]
    sources: list[_Source]
    files: dict[str, _File]
    exhausted: bool = False


class _CorpusSettings(Content, extra="allow"):
    text_key: str
    format: str = "text"
    messages_key: str | None = None
    train_on: str | None = None
    paths: list[str] = Field(default_factory=list)


class _Settings(Content, extra="allow"):
    validation_fraction: float = Field(ge=0, lt=1)
    streaming: bool
    corpora: dict[str, _CorpusSettings]


class _Manifest(Content):
    """What the program relies on in a manifest."""

    settings: _Settings
    tokenizer_sha256: Sha256
    end_of_text: Count
    dtype: Literal["<u2", "<u4"]
    chat_template: str | None = None
    corpora: dict[str, _Corpus]


def read_prepared(folder: Path, say: Callable[[str], None] = lambda line: None) -> Prepared | None:
    """What ``folder`` holds, or None if it holds nothing whole. say: told why, if it holds something."""
    path = folder / "manifest.json"
    try:
        manifest = read_json_object(path, most=_MOST_BYTES)
        if manifest.get("format") != FORMAT:
            return None
        if manifest.get("manifest_sha256") != _hash_of(manifest):
            raise ValueError("it has changed since it was written")
        _check(typed(_Manifest, manifest))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        say(f"{path} cannot be used, so the corpus is prepared again: {error}")
        return None
    return Prepared(folder, manifest)


def _hash_of(manifest: dict[str, Any]) -> str:
    """Of all that a manifest says, but for itself and for times of change: a copy has others."""

    def timeless(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: timeless(each) for key, each in value.items() if key != "mtime_ns"}

    return digest_of(timeless(manifest), but="manifest_sha256")


def _check(manifest: _Manifest) -> None:
    """Raise ValueError where the parts of a manifest contradict each other."""
    if manifest.corpora.keys() != manifest.settings.corpora.keys():
        raise ValueError("its corpora differ from its settings")
    chats = [corpus for corpus in manifest.settings.corpora.values() if corpus.format == "chat"]
    if any(None in (manifest.chat_template, chat.messages_key, chat.train_on) for chat in chats):
        raise ValueError("it does not say how conversations were read")
    width = np.dtype(manifest.dtype).itemsize
    if manifest.end_of_text >= 2 ** (8 * width):
        raise ValueError("its end-of-text is not a token")
    for name, corpus in manifest.corpora.items():
        if not {*PARTS} <= corpus.documents.keys() & corpus.tokens.keys():
            raise ValueError(f"it does not say what corpus {shown(name)} has")
        if any(not re.fullmatch(r"[\w.-]+", file) or file.startswith(".") for file in (*corpus.files, name or "_")):
            raise ValueError("it names a file outside its folder")
        for part in PARTS:
            sizes = [e.size for file, e in corpus.files.items() if file.startswith(part) and file.endswith(".bin")]
            if sum(sizes) != corpus.tokens[part] * width:
                raise ValueError(f"its files do not have the {corpus.tokens[part]:,} {part} tokens that it counts")


def describe_chat(name: str, entry: dict[str, Any]) -> str:
    """A corpus by its ``entry`` of the manifest, in a line; "" if it is none of conversations, or has none."""
    counts, tokens = entry.get("counts"), sum(entry["tokens"].values())
    if not counts:
        return ""
    of = f" of {name}" if name else ""
    return (
        f"{counted(sum(entry['documents'].values()), 'conversation')}{of}, {counted(counts['turns'], 'turn')} of the "
        f"assistant, {counted(tokens, 'token')}, {counts['trained'] / tokens:.1%} of them trained on"
    )


def template_hash(folder: Path) -> str | None:
    """Fingerprint of the chat template of the tokenizer in ``folder``; None if it has none that can be read."""
    try:
        template = ChatTemplate.find(folder)
    except UserError:
        return None
    return template.fingerprint if template else None


def _tokenizer_hash(folder: Path) -> str | None:
    try:
        return Tokenizer(folder).fingerprint
    except UserError:
        return None
