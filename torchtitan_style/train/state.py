"""All loop state that a resumed run needs, as every checkpoint holds it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from torchtitan_style.common.typed import Content, Count, problem_in

__all__ = ["SavedState", "SkippedSteps", "TrainState"]


class SavedState(Content):
    """The content of a checkpoint's train_state.json."""

    state: dict[str, Any] = Field(default_factory=dict)
    """Of a ``TrainState``."""
    identity: dict[str, dict[str, Any]]


@dataclasses.dataclass
class SkippedSteps:
    """Steps in which the weights were not updated."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    total: Count = 0
    in_a_row: Count = 0
    """Up to the last step."""

    def count(self, *, taken: bool) -> None:
        """Count one step."""
        self.total += not taken
        self.in_a_row = 0 if taken else self.in_a_row + 1


@dataclasses.dataclass
class TrainState:
    """What a checkpoint holds beside weights and optimizer state. The names of the fields are part of its format."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    step: Count = 0
    """The last step that was done."""
    rows_seen: Count = 0
    best_val_loss: float | None = None
    """The lowest so far of the loss that ``best_metric``, ``RunData.best_metric``, names."""
    best_metric: str = "val_loss"
    validated_step: Count | None = None
    """The last step that was validated."""
    skipped: SkippedSteps = dataclasses.field(default_factory=SkippedSteps)
    rewinds: Count = 0
    """Rewinds in a row that did not get past ``furthest_step``."""
    furthest_step: Count = 0
    """The step at which the first of these rewinds began."""
    went_back_to: Count = 0
    """The checkpoint.load_step that the run last started from; 0: none."""
    recent_losses: list[float] = dataclasses.field(default_factory=list)
    """What ``StepGuard`` compares the next loss with."""
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The position in the data: what ``Loader.start`` takes."""

    def update_best(self, val_loss: float, metric: str = "val_loss") -> bool:
        """Take note of the validation loss at this step, that of ``metric``. Whether it is the lowest so far; of
        another metric than before, the first is."""
        if metric != self.best_metric:
            self.best_metric, self.best_val_loss = metric, None
        best = math.isfinite(val_loss) and (self.best_val_loss is None or val_loss < self.best_val_loss)
        if best:
            self.best_val_loss = val_loss
        self.validated_step = self.step
        return best

    def rewind_to(self, saved: TrainState) -> None:
        """Restore ``saved``, except the position in the data, which stays ahead, and the count of rewinds."""
        self.step, self.skipped, self.recent_losses = saved.step, saved.skipped, saved.recent_losses
        self.best_val_loss, self.best_metric = saved.best_val_loss, saved.best_metric
        self.validated_step = saved.validated_step

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> TrainState:
        """Fields that an older version did not write have their defaults. Raises ValueError if a value is of another
        type, or there cannot be such steps."""
        try:
            state: TrainState = _adapter().validate_json(json.dumps(saved))
        except ValidationError as error:
            raise ValueError(problem_in(error)) from None
        if max(state.skipped.total, state.skipped.in_a_row) > state.step:
            raise ValueError(f"{state.skipped.total} of {state.step} steps were skipped")
        return state


@functools.cache
def _adapter() -> TypeAdapter[TrainState]:
    return TypeAdapter(TrainState)
