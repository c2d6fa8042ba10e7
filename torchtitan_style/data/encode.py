"""Documents to token ids: a text as it is, a conversation as one or more samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from torchtitan_style.common.errors import UserError

from .chat.samples import TRAINED, Sample, Sampler, Unusable
from .chat.template import ChatTemplate
from .problems import KEPT
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatRecipe:
    """How conversations become samples."""

    messages_key: str
    train_on: str
    longest: int
    """Tokens of a sample at most; 0: any number."""


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
