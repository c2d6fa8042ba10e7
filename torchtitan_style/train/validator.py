"""Validation while training: when it is due, and the loss on the held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from torchtitan_style.config.schema import Validation
from torchtitan_style.metrics.validation import HeldOutSet, validate

from .observer import Observer
from .state import TrainState
from .step import evaluating


class Validator:
    """Called by all ranks together. batches: this rank's held-out rows of the corpus, if there are any; sets: further
    sets; group: the ranks that have others, and the other ``stages`` of a pipeline."""

    def __init__(
        self,
        config: Validation,
        model: nn.Module,
        batches: Sequence[Sequence[Any]],
        *,
        sets: Sequence[HeldOutSet] = (),
        last_step: int,
        group: dist.ProcessGroup,
        stages: int = 1,
        observer: Observer,
    ) -> None:
        self.config, self.model, self.batches, self.sets = config, model, batches, sets
        self.last_step, self.group, self.stages, self.observer = last_step, group, stages, observer

    def due(self, state: TrainState) -> bool:
        """Whether the present step is to be validated and was not."""
        step = state.step
        return (
            self.config.enable
            and state.validated_step != step
            and (step % self.config.freq == 0 or step == self.last_step)
        )

    def run(self, step: int, *, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Loss, perplexity and accuracy, and those of each set with its bits per byte; None if ``stop``, which is
        asked before each batch, said so."""

        def forward(*batch: Any) -> tuple[Tensor, Tensor]:
            self.observer.before_validation_batch(step)
            found: tuple[Tensor, Tensor] = self.model(*batch)
            return found

        def figures(batches: Sequence[Sequence[Any]]) -> dict[str, float] | None:
            return validate(forward, batches, self.group, copies=self.stages, stop=stop)

        with evaluating(self.model):
            found = figures(self.batches) if self.batches else {}
            for each in self.sets:
                if found is None or (of_set := figures(each.batches)) is None:
                    return None
                found |= each.figures(of_set)
        return found
