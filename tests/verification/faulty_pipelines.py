"""Run by test_pipeline_faults.py as the ranks of a pipeline: what ``faulty_layouts.py`` does, with other faults."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from faulty_layouts import Patch, main
from torch.distributed.pipelining import PipelineStage

from torchtitan_style.distributed import pipeline
from torchtitan_style.train.stopping import ending_at_once


@contextlib.contextmanager
def dropped_gradient() -> Iterator[None]:
    """A stage sends zeros back for one microbatch."""
    real = PipelineStage.backward_one_chunk

    def backward_one_chunk(self: Any, chunk: int, *args: Any, **kwargs: Any) -> None:
        real(self, chunk, *args, **kwargs)
        if chunk == 1:
            self.bwd_cache[chunk] = tuple(None if g is None else torch.zeros_like(g) for g in self.bwd_cache[chunk])

    with patch.object(PipelineStage, "backward_one_chunk", backward_one_chunk):
        yield


def forget_copy(tied: Any) -> None:
    tied._wait()
    if tied.copy is not None:
        tied.copy.grad = None


@contextlib.contextmanager
def mixed_up_labels() -> Iterator[None]:
    """The last stage pairs each row with the labels of another."""
    split = pipeline._four

    def four(microbatch: Any) -> Any:
        inputs, labels, *others = split(microbatch)
        return inputs, labels.roll(1, 0), *others

    with patch.object(pipeline, "_four", four):
        yield


FAULTS: dict[str, Callable[[], Patch]] = {
    "none": contextlib.nullcontext,
    "a stage boundary drops a gradient": dropped_gradient,
    "a tied copy not summed": lambda: patch.object(pipeline._TiedHead, "sum_gradients", forget_copy),
    "a tied copy not brought up to date": lambda: patch.object(pipeline._TiedHead, "send_weights", lambda self: None),
    "labels of other rows": mixed_up_labels,
}


if __name__ == "__main__":
    with ending_at_once():
        main(Path(sys.argv[1]), FAULTS)
