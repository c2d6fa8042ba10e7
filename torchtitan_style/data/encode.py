"""Documents to token ids: a text as it is, a conversation as one or more samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from torchtitan_style.common.errors import UserError

from .chat.conversations import Conversations
from .chat.samples import TRAINED, Sample, Sampler, Unusable
from .chat.template import ChatTemplate
from .shards import ShardWriter
from .sources.problems import KEPT
from .sources.records import Fields
from .tokenizer.tokenizer import Tokenizer

PARTS = ("train", "validation")
"""Of a corpus. Each document is in one of them: see ``is_held_out``."""


@dataclass(frozen=True)
class ChatRecipe:
    """How conversations become samples."""

    messages_key: str
    train_on: str
    longest: int
    """Tokens of a sample at most; 0: any number."""


@dataclass(frozen=True)
class Recipe:
    """How documents become tokens: all that a process needs to know."""

    tokenizer: str
    """Its folder."""
    text_key: str
    max_document_bytes: int
    validation_fraction: float
    vocab_size: int
    dtype: str
    allow_lost_files: tuple[str, ...] = ()
    """Names and patterns of files that may be lost."""
    chat: ChatRecipe | None = None
    """Of conversations; None: the documents are texts."""

    @property
    def fields(self) -> Fields:
        """What of a row is its document."""
        return self.text_key if self.chat is None else Conversations(self.chat.messages_key)

    def encoder(self, tokenizer: Tokenizer) -> Encode:
        """What makes samples of documents."""
        return encoder(tokenizer, vocab_size=self.vocab_size, chat=self.chat, assets=self.tokenizer)

    def writer(self, folder: Path, part: str, number: int, end_of_text: int) -> ShardWriter:
        """What writes a shard of them."""
        chat = self.chat is not None
        return ShardWriter(folder, part, number, dtype=self.dtype, end_of_text=end_of_text, chat=chat)


class Encoded(NamedTuple):
    """What becomes of one document."""

    samples: list[Sample]
    problem: str = ""
    """Why it is left out; or, from ``KEPT`` on, what is remarkable about it."""
    counts: Mapping[str, int] = MappingProxyType({})
    """Of a conversation: what ``COUNTS`` has."""


COUNTS = ("turns", "trained", "samples", "split", "added", "cut")
"""Turns of the assistant; tokens that are trained on; samples; conversations that are several; tokens that these have
more than their last sample; samples cut at a row's end."""

Encode = Callable[[list[str]], list[Encoded]]


def is_held_out(text: str, fraction: float) -> bool:
    """By the text itself: the same document is always on the same side, and so are its copies."""
    raw = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(raw, "little") < fraction * 2**64


def encoder(tokenizer: Tokenizer, *, vocab_size: int, chat: ChatRecipe | None, assets: str) -> Encode:
    """What makes token ids of documents. chat: of conversations; None: of texts. assets: the tokenizer's folder, which
    has the chat template."""

    def checked(encoded: Encoded) -> Encoded:
        largest = max((int(sample.ids.max()) for sample in encoded.samples if len(sample.ids)), default=0)
        return Encoded([], f"token id {largest} is not below model.vocab_size") if largest >= vocab_size else encoded

    if chat is None:
        return lambda texts: [checked(Encoded([Sample(ids)])) for ids in tokenizer.encode_batch(texts)]
    template = ChatTemplate.find(Path(assets))
    if template is None:
        raise UserError(f"{assets}: the chat template is missing")
    sampler, longest = Sampler(template, tokenizer, chat.train_on), chat.longest
    return lambda texts: [checked(_conversation(text, sampler, longest)) for text in texts]


def _conversation(text: str, sampler: Sampler, longest: int) -> Encoded:
    try:
        samples, turns, notes = sampler(text)
    except Unusable as error:
        return Encoded([], str(error))
    added = sum(len(sample.ids) for sample in samples[:-1])
    kept = [cut for sample in samples if _trained(cut := _cut(sample, longest))]
    too_long = sum(len(sample.ids) > longest > 0 for sample in samples)
    if not kept:
        what = f"no token to train on within the {longest - 1:,} tokens of a row (training.seq_len)"
        return Encoded([], what if too_long else "no token to train on")
    if too_long:
        rest = len(samples) - len(kept)
        size = max(len(sample.ids) for sample in samples)
        notes = [*notes, f"{size:,} tokens, cut at the {longest - 1:,} of a row (training.seq_len)"]
        if rest:
            notes.append(f"{rest} of its {len(samples)} samples have no token to train on in a row and are left out")
    counts = {
        "turns": turns,
        "trained": sum(map(_trained, kept)),
        "samples": len(kept),
        "split": int(len(samples) > 1),
        "added": added,
        "cut": too_long,
    }
    return Encoded(kept, KEPT + "; ".join(notes) if notes else "", counts)


def _cut(sample: Sample, longest: int) -> Sample:
    """The beginning of ``sample``: all contexts in it stay what they are."""
    if not longest or len(sample.ids) <= longest:
        return sample
    assert sample.marks is not None
    return Sample(sample.ids[:longest], sample.marks[:longest])


def _trained(sample: Sample) -> int:
    assert sample.marks is not None
    return int((sample.marks & TRAINED).astype(bool).sum())
