"""The tokenizer of a run: trained on the beginning of its corpora, or taken from elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from torchtitan_style.common.errors import UserError
from torchtitan_style.config.schema import Data

from ..chat.conversations import contents_of
from ..sources.corpus import SourceFile
from ..sources.documents import texts_of
from ..sources.records import fields_of
from ..tokenizer.tokenizer import Tokenizer, copy_pretrained, train

_TOKENIZER_TRAINING_CHARACTERS = 2**28
"""Text that a tokenizer is trained on at most: more does not change a small vocabulary much."""


def make_tokenizer(
    config: Data,
    sources: dict[str, list[SourceFile]],
    staging: Path,
    vocab_size: int,
    say: Callable[[str], None],
    trained: Path | None,
) -> Tokenizer:
    """The tokenizer of a configuration, in the folder ``staging / "tokenizer"``.

    sources: each corpus's files. trained: where one trained on the corpus is already, if there is one. Raises UserError
    if it cannot be had, or does not fit ``vocab_size``.
    """
    folder = staging / "tokenizer"
    if not folder.exists():
        temporary = staging / "tokenizer.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        if config.tokenizer == "train" and trained and (trained / "tokenizer.json").exists():
            shutil.copytree(trained, temporary)
        elif config.tokenizer == "train":
            say(f"training a tokenizer of {vocab_size} tokens on the corpus")
            train(_training_texts(config, sources), temporary, vocab_size=vocab_size)
        else:
            try:
                copy_pretrained(config.tokenizer, temporary)
            except UserError as error:
                raise UserError(f"data.tokenizer: {error}") from None
        temporary.rename(folder)
    try:
        tokenizer = Tokenizer(folder)
    except UserError as error:
        raise UserError(f"data.tokenizer: {error}") from None
    if tokenizer.num_ids > vocab_size:
        raise UserError(
            f'model.vocab_size: {vocab_size} is too small for the tokenizer "{config.tokenizer}", whose ids go up '
            f"to {tokenizer.num_ids - 1}; set model.vocab_size to {-(-tokenizer.num_ids // 128) * 128}, or, if "
            "weights are loaded, data.tokenizer to theirs"
        )
    return tokenizer


def _training_texts(config: Data, sources: dict[str, list[SourceFile]]) -> Iterator[str]:
    """The beginning of every corpus, as much of each as its weight says."""
    for (name, corpus), weight in zip(config.corpora().items(), config.weights(), strict=True):
        room = int(_TOKENIZER_TRAINING_CHARACTERS * weight)
        for document in texts_of(sources[name], fields=fields_of(corpus), max_bytes=config.max_document_bytes):
            text = contents_of(document) if corpus.format == "chat" else document
            yield text[:room]
            room -= len(text)
            if room <= 0:
                break
