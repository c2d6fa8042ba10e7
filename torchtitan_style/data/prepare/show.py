"""The rows of a run as its model sees them, in the order in which it takes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from torchtitan_style.config import Config
from torchtitan_style.config.layout import plan_batch, plan_streams

from ..loader import PreparedSteps, StreamedSteps
from ..rows import NO_LABEL, PADDING, Rows
from ..tokenizer.tokenizer import Tokenizer
from .prepared import Prepared
from .store import CorpusStore


def first_rows(config: Config, store: CorpusStore, prepared: Prepared, count: int) -> Rows:
    """The first ``count`` rows of training, or of a prepared corpus all, if it has fewer."""
    data, seq_len, seed = config.data, config.training.seq_len, config.training.seed
    if data.streaming:
        global_batch = plan_batch(config.training, 1).global_batch_size
        streams = StreamedSteps(
            store.streamed(prepared),
            data.weights(),
            global_batch=global_batch,
            num_streams=plan_streams(data, global_batch, 1),
            packing=data.packing,
            seq_len=seq_len,
            seed=seed,
        )
        parts = streams.steps({}, np.arange(global_batch))
        return Rows.join([next(parts).rows for _ in range(-(-count // global_batch))]).take(np.arange(count))
    sources = [prepared.rows(name, "train", seq_len=seq_len, packing=data.packing) for name in prepared.names]
    count = min(count, sum(source.num_rows for source in sources))
    steps = PreparedSteps(sources, prepared.names, data.weights(), global_batch=count, seed=seed)
    return next(steps.steps({}, np.arange(count))).rows


def as_json(rows: Rows) -> Iterator[dict[str, list[int]]]:
    """An object a row: ids; labels, the token after each, or -100 where there is no loss; documents, -1 for padding."""
    for ids, labels, documents in zip(rows.inputs, rows.labels, rows.documents, strict=True):
        yield {"ids": ids.tolist(), "labels": labels.tolist(), "documents": documents.tolist()}


class Stretch(NamedTuple):
    """Consecutive tokens of a document that are all trained on, or all not."""

    text: str
    trained: bool


class ShownDocument(NamedTuple):
    """A document of a row. first, last: its positions."""

    first: int
    last: int
    stretches: list[Stretch]
    trained: int
    """Tokens that are trained on."""


class ShownRow(NamedTuple):
    """A row. padding: its first position that is padding; None if there is none."""

    positions: int
    trained: int
    documents: list[ShownDocument]
    padding: int | None


def as_text(rows: Rows, tokenizer: Tokenizer) -> Iterator[ShownRow]:
    """Each row in words. Its last label, which is no input, is part of its last document if it is trained on."""
    for ids, labels, documents in zip(rows.inputs, rows.labels, rows.documents, strict=True):
        borders = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), len(ids)]
        shown, padding = [], None
        for first, end in itertools.pairwise(borders):
            if documents[first] == PADDING:
                padding = first
            else:
                shown.append(_document(ids[first:end], labels[first:end], first, tokenizer))
        yield ShownRow(len(ids), int((labels != NO_LABEL).sum()), shown, padding)


def _document(ids: Any, labels: Any, first: int, tokenizer: Tokenizer) -> ShownDocument:
    trained = np.concatenate(([False], labels != NO_LABEL))
    tokens = np.append(ids, labels[-1])[: len(ids) + int(trained[-1])]
    trained = trained[: len(tokens)]
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
    stretches = [
        Stretch(tokenizer.show(tokens[begin:end].tolist()), bool(trained[begin]))
        for begin, end in itertools.pairwise(borders)
    ]
    return ShownDocument(first, first + len(ids) - 1, stretches, int((labels != NO_LABEL).sum()))
