"""What a run knows of itself, as every checkpoint has it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torchtitan_style.metrics.log import SkippedSteps

__all__ = ["TrainState"]


@dataclasses.dataclass
class TrainState:
    """All that a resumed run goes on from, beside weights and optimizer state."""

    step: int = 0
    rows_seen: int = 0
    best_val_loss: float | None = None
    validated_step: int | None = None
    """The last step that was validated."""
    skipped: SkippedSteps = dataclasses.field(default_factory=SkippedSteps)
    rewinds: int = 0
    """In a row, without getting past the step that the first one left from, which is ``furthest_step``."""
    furthest_step: int = 0
    went_back_to: int = 0
    """The checkpoint.load_step that this course began with; 0: none."""
    recent_losses: list[float] = dataclasses.field(default_factory=list)
    """What the next loss is compared with."""
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Where the data is: what ``Loader.start`` takes."""

    def go_back_to(self, saved: TrainState) -> None:
        """Be ``saved`` again in all but the data, which goes on, and the count of how often this happened."""
        self.step, self.skipped, self.recent_losses = saved.step, saved.skipped, saved.recent_losses
        self.best_val_loss, self.validated_step = saved.best_val_loss, saved.validated_step

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> TrainState:
        """What an older version did not write is as at the start of a run."""
        return cls(**saved | {"skipped": SkippedSteps(**saved.get("skipped", {}))})
