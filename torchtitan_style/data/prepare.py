"""The corpus as one file of token ids for training and one for validation, made once per run.

    <dump folder>/tokenizer/           the tokenizer
    <dump folder>/data/train.bin       token ids, document after document, each with end-of-text
    <dump folder>/data/validation.bin  the same for the held-out documents
    <dump folder>/data/manifest.json   what they were made from

Needs no torch: the launcher prepares before it starts the ranks, so that a mistake in the corpus is
found at once, and with nothing written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from torchtitan_style.config.schema import Data
from torchtitan_style.errors import UserError
from torchtitan_style.folders import first_missing

from .corpus import corpus_files, read_documents
from .tokenizer import Tokenizer, copy_pretrained, train

__all__ = ["PreparedData", "prepare"]

_FORMAT = 1
_BATCH = 64
"""Documents tokenized at once."""
_TOKENIZER_TRAINING_CHARACTERS = 2**28
"""Text that a tokenizer is trained on at most: more does not change a small vocabulary much."""


@dataclass(frozen=True)
class PreparedData:
    """What is in a run's ``data/`` folder."""

    format: int
    settings: dict[str, Any]
    """The settings that decide the content."""
    sources: list[list[Any]]
    """Name, size and time of change of the corpus's files: while these are the same, so is the content."""
    corpus_sha256: str
    tokenizer_sha256: str
    dtype: str
    documents: int
    train_tokens: int
    validation_tokens: int

    @property
    def fingerprint(self) -> str:
        """Changes whenever the tokens do."""
        content = asdict(self)
        del content["sources"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def prepare(
    config: Data,
    dump_folder: Path,
    *,
    vocab_size: int,
    seq_len: int,
    say: Callable[[str], None],
) -> PreparedData:
    """Make ``tokenizer/`` and ``data/`` in ``dump_folder``, or see that they are there and still right.

    say: called with a line of progress.

    Raises UserError, with nothing left behind, if the corpus cannot be used.
    """
    settings = config.model_dump(exclude={"paths", "text_key"}) | {"vocab_size": vocab_size, "seq_len": seq_len}
    present = _read_manifest(dump_folder / "data")
    if present and present.settings == settings and present.sources == _sources(config):
        return present
    if present and present.settings == settings and present.corpus_sha256 == _hash_corpus(config):
        return present
    if present and any(dump_folder.glob("checkpoint/step-*")):
        names = {"vocab_size": "model.vocab_size (or model.flavor)", "seq_len": "training.seq_len"}
        changed = [names.get(key, f"data.{key}") for key, new in settings.items() if present.settings.get(key) != new]
        what = f"{', '.join(changed)} changed" if changed else "the corpus's files changed"
        raise UserError(
            f"{dump_folder}: {what} since this run began, so it cannot go on with the next batch; "
            "put it back, or start a new run with another --job.dump_folder"
        )

    made = first_missing(dump_folder)
    temporary = dump_folder / "data.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tokenizer = _make_tokenizer(config, temporary / "tokenizer", vocab_size, say)
        _check_vocabulary(config, tokenizer, vocab_size)
        prepared = _tokenize(config, temporary, tokenizer, settings=settings, say=say)
        manifest = json.dumps(asdict(prepared), indent=2) + "\n"
        (temporary / "manifest.json").write_text(manifest, encoding="utf-8")
        for name in ("tokenizer", "data"):
            shutil.rmtree(dump_folder / name, ignore_errors=True)
        (temporary / "tokenizer").rename(dump_folder / "tokenizer")
        temporary.rename(dump_folder / "data")
    except OSError as error:
        shutil.rmtree(made or temporary, ignore_errors=True)
        raise UserError(f"job.dump_folder: cannot write to {dump_folder}: {error.strerror or error}") from None
    except BaseException:
        shutil.rmtree(made or temporary, ignore_errors=True)
        raise
    return prepared


def _read_manifest(folder: Path) -> PreparedData | None:
    """What ``folder`` holds, or None if it holds nothing whole."""
    try:
        found = PreparedData(**json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
        width = np.dtype(found.dtype).itemsize
        sizes = [(folder / f"{part}.bin").stat().st_size for part in ("train", "validation")]
        if found.format != _FORMAT or sizes != [width * found.train_tokens, width * found.validation_tokens]:
            return None
        whole = Tokenizer(folder.parent / "tokenizer").fingerprint == found.tokenizer_sha256
        return found if whole else None
    except Exception:  # missing, cut short or of another version: it is made anew
        return None


def _sources(config: Data) -> list[list[Any]]:
    stats = [(path, path.stat()) for path in corpus_files(config)]
    files = [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    return [[config.text_key], *files]


def _hash_corpus(config: Data) -> str:
    digest = hashlib.sha256()
    for text in read_documents(config):
        _add_document(digest, text)
    return digest.hexdigest()


def _make_tokenizer(config: Data, folder: Path, vocab_size: int, say: Callable[[str], None]) -> Tokenizer:
    if config.tokenizer == "train":
        say(f"training a tokenizer of {vocab_size} tokens on the corpus")
        train(_up_to(read_documents(config), _TOKENIZER_TRAINING_CHARACTERS), folder, vocab_size=vocab_size)
        return Tokenizer(folder)
    try:
        copy_pretrained(config.tokenizer, folder)
        return Tokenizer(folder)
    except UserError as error:
        raise UserError(f"data.tokenizer: {error}") from None


def _up_to(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def _check_vocabulary(config: Data, tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.num_ids > vocab_size:
        raise UserError(
            f'model.vocab_size: {vocab_size} is too small for the tokenizer "{config.tokenizer}", whose ids go up '
            f"to {tokenizer.num_ids - 1}; set model.vocab_size to {-(-tokenizer.num_ids // 128) * 128}, or, if "
            "weights are loaded, data.tokenizer to theirs"
        )


def _tokenize(
    config: Data, folder: Path, tokenizer: Tokenizer, *, settings: dict[str, Any], say: Callable[[str], None]
) -> PreparedData:
    """Write ``train.bin`` and ``validation.bin`` into ``folder``."""
    dtype = np.dtype("<u2" if settings["vocab_size"] <= 2**16 else "<u4")
    digest = hashlib.sha256()
    documents = 0
    with (folder / "train.bin").open("w+b") as train_file, (folder / "validation.bin").open("w+b") as held_file:
        texts = read_documents(config)
        while batch := list(islice(texts, _BATCH)):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                file = held_file if _is_held_out(text, config.validation_fraction) else train_file
                file.write(np.array([*ids, tokenizer.end_of_text], dtype=dtype).tobytes())
                _add_document(digest, text)
            if (documents + len(batch)) // 100_000 > documents // 100_000:
                say(f"tokenized {documents + len(batch):,} documents")
            documents += len(batch)
        if not documents:
            raise UserError("data.paths: the corpus is empty: its files hold no text")
        row_bytes = (settings["seq_len"] + 1) * dtype.itemsize
        _ensure_rows(train_file, held_file, row_bytes, config.validation_fraction, dtype.itemsize, say)
        sizes = [file.seek(0, 2) // dtype.itemsize for file in (train_file, held_file)]
    say(f"tokenized {documents:,} documents: {sizes[0]:,} tokens to train on, {sizes[1]:,} held out")
    return PreparedData(
        format=_FORMAT,
        settings=settings,
        sources=_sources(config),
        corpus_sha256=digest.hexdigest(),
        tokenizer_sha256=tokenizer.fingerprint,
        dtype=dtype.str,
        documents=documents,
        train_tokens=sizes[0],
        validation_tokens=sizes[1],
    )


def _add_document(digest: hashlib._Hash, text: str) -> None:
    raw = text.encode("utf-8", errors="surrogatepass")
    digest.update(len(raw).to_bytes(8, "little"))
    digest.update(raw)


def _is_held_out(text: str, fraction: float) -> bool:
    """By the text itself: the same document is always on the same side, and so are its copies."""
    raw = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(raw, "little") < fraction * 2**64


def _ensure_rows(
    train_file: BinaryIO, held_file: BinaryIO, row: int, fraction: float, width: int, say: Callable[[str], None]
) -> None:
    """See to it that both files hold at least one row (in bytes), or raise UserError.

    With too few documents to hold out whole ones, the end of the corpus is held out instead.
    """
    train_size, held_size = train_file.seek(0, 2), held_file.seek(0, 2)
    if train_size >= row and (fraction == 0 or held_size >= row):
        return
    total = train_size + held_size
    end = max(row, int(total * fraction) // width * width) if fraction else 0
    if total - end < row:
        needed = row // width
        also = f", and as many again to hold out (data.validation_fraction = {fraction})" if fraction else ""
        raise UserError(
            f"training.seq_len: the corpus has only {total // width} tokens, but a row takes {needed}{also}; "
            "bring more text, or lower training.seq_len"
        )
    held_file.seek(0)
    shutil.copyfileobj(held_file, train_file)
    held_file.truncate(0)
    held_file.seek(0)
    train_file.seek(total - end)
    shutil.copyfileobj(train_file, held_file)
    train_file.truncate(total - end)
    if fraction:
        say(f"too few documents to hold out whole ones: the last {end // width:,} tokens of the corpus are held out")
