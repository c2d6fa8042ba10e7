"""Run by test_context_faults.py as ranks that share out rows: what ``faulty_layouts.py`` does, with other faults."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from faulty_layouts import Patch, main

from torchtitan_style.config.layout import RowPart
from torchtitan_style.distributed import context
from torchtitan_style.models.qwen3 import attention, model
from torchtitan_style.train.stopping import ending_at_once


def masks_by_local_positions() -> Patch:
    """Each rank takes its positions for the first ones of the row."""
    real = attention.part_mask

    def part_mask(documents: Any, t: int, window: Any, spans: Any, **named: Any) -> Any:
        size = spans[0][1] - spans[0][0]
        return real(documents, t, window, ((0, size), (size, 2 * size)), **named)

    return patch.object(model, "part_mask", part_mask)


@contextlib.contextmanager
def missing_keys() -> Iterator[None]:
    """The last span of keys of the other rank does not arrive."""
    real = context._Gather.apply

    def apply(*arguments: Any) -> Any:
        k, v = real(*arguments)
        keep = torch.ones(k.shape[2], 1)
        keep[: k.shape[2] // 4] = 0
        return k * keep, v

    with patch.object(context._Gather, "apply", apply):
        yield


@contextlib.contextmanager
def gradients_of_own_queries() -> Iterator[None]:
    """Keys get the gradients that come from this rank's queries alone."""
    real = context._Gather.backward

    def backward(ctx: Any, *grads: Any) -> Any:
        rank = torch.distributed.get_rank()
        mine = [
            torch.cat([x.chunk(2 * ctx.ranks, 2)[i] for i in (rank, 2 * ctx.ranks - 1 - rank)], dim=2) for x in grads
        ]
        return *mine, None, None

    with patch.object(context._Gather, "backward", staticmethod(backward)):
        yield
    assert context._Gather.backward is real


FAULTS: dict[str, Callable[[], Patch]] = {
    "none": contextlib.nullcontext,
    "a mask by local positions": masks_by_local_positions,
    "a block of keys missing": missing_keys,
    "gradients of keys not summed": gradients_of_own_queries,
    "ranks with the same part": lambda: patch.object(
        RowPart, "spans", lambda self, seq_len: ((0, seq_len // 4), (3 * seq_len // 4, seq_len))
    ),
}


if __name__ == "__main__":
    with ending_at_once():
        main(Path(sys.argv[1]), FAULTS)
