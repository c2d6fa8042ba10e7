"""Documents as windows of tokens, and windows as batches.

A text t₀ … tₙ₋₁ is predicted from the inputs ⟨end of text⟩ t₀ … tₙ₋₂, so that each of its tokens is scored once. The
inputs of a conversation are its own t₀ … tₙ₋₂, and only those labels are scored that training trains on. If a document
is longer than a window, window k takes the inputs from k · stride on and scores those labels that no window before it
has scored: in all but the first they have ``seq_len - stride`` tokens of context at least.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

Source = TypeVar("Source")

IGNORE = -100
"""Label of a position that is not scored."""
_BATCHES_SORTED = 16
"""So many batches are filled from windows sorted by length, which leaves little padding."""


@dataclass(frozen=True)
class Window(Generic[Source]):
    """One row for the model."""

    inputs: Sequence[int]
    labels: Sequence[int]
    """What follows each input; IGNORE where that is not scored."""
    context: int
    """The first labels, which are not scored."""
    source: Source = field(compare=False)
    """What the caller adds its figures up in."""


def split_document(
    inputs: Sequence[int], labels: Sequence[int], *, seq_len: int, stride: int, source: Source
) -> Iterator[Window[Source]]:
    """Windows that score each of ``labels`` once; none where all would be ignored."""
    begin = scored = 0
    while scored < len(labels):
        end = min(begin + seq_len, len(labels))
        if any(label != IGNORE for label in labels[scored:end]):
            yield Window(inputs[begin:end], labels[begin:end], scored - begin, source)
        begin, scored = begin + stride, end


def batches(windows: Iterable[Window[Source]], *, tokens: int) -> Iterator[list[Window[Source]]]:
    """Windows of similar length together, at most ``tokens`` positions with padding, but one window at least."""
    pool: list[Window[Source]] = []
    positions = 0
    for window in windows:
        pool.append(window)
        positions += len(window.inputs)
        if positions >= _BATCHES_SORTED * tokens:
            yield from _fill(pool, tokens)
            pool, positions = [], 0
    yield from _fill(pool, tokens)


def _fill(pool: list[Window[Source]], tokens: int) -> Iterator[list[Window[Source]]]:
    pool = sorted(pool, key=lambda window: -len(window.inputs))
    while pool:
        rows = max(1, tokens // len(pool[0].inputs))
        yield pool[:rows]
        pool = pool[rows:]


def stack(rows: Sequence[Window[Source]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, T]. Padding is at the end, where causal attention does not see it."""
    longest = max(len(row.inputs) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE)
    for i, row in enumerate(rows):
        ids[i, : len(row.inputs)] = torch.as_tensor(row.inputs)
        labels[i, row.context : len(row.labels)] = torch.as_tensor(row.labels[row.context :])
    return ids.to(device), labels.to(device)
