"""What to do about bad steps: skip, rewind, or stop.

Whether a step is bad is decided on the device, before the weights change (``optim/guard.py``): such a step is skipped
on all ranks. This policy hears of it when the log reads the figures, up to ``metrics.log_freq`` steps later.

    not finite, or a spike with spike_action = "skip"       the step stays skipped and training goes on
    a spike with spike_action = "rewind"                     go back to the newest checkpoint
    more than max_skipped_steps skipped in a row             RunError
    more than max_skipped_steps rewinds without progress     RunError
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence

from torchtitan_style.common.errors import RunError
from torchtitan_style.config.schema import Training
from torchtitan_style.metrics.log import StepFigures

from .state import TrainState


class Decision(enum.Enum):
    """How to go on after some steps."""

    CONTINUE = enum.auto()
    REWIND = enum.auto()


class StepPolicy:
    """Decides on every rank from the same figures, so all ranks decide alike. Keeps its counts in ``state``."""

    def __init__(self, config: Training, state: TrainState, *, warn: Callable[[str], None]) -> None:
        self.max_skipped, self.rewinds_spikes = config.max_skipped_steps, config.spike_action == "rewind"
        self.state, self.warn = state, warn

    def review(self, steps: Sequence[StepFigures]) -> Decision:
        """Count the skipped ones of ``steps``, which follow those of the last call, warn of each, and decide.

        Raises RunError if more than training.max_skipped_steps in a row were skipped, unless a rewind follows.
        """
        if not steps:
            return Decision.CONTINUE
        skipped = self.state.skipped
        longest, spiked = 0, False
        for step in steps:
            skipped.count(taken=step.taken)
            longest = max(longest, skipped.in_a_row)
            if not step.taken:
                is_spike = math.isfinite(step.loss) and math.isfinite(step.grad_norm)
                spiked |= is_spike
                self.warn(
                    f"step {step.step} was skipped: loss {step.loss:.4g}, gradient norm {step.grad_norm:.4g}: "
                    + ("a spike (training.spike_sigma)" if is_spike else "not finite")
                )
        rewinds = spiked and self.rewinds_spikes
        if longest > self.max_skipped and not rewinds:
            raise RunError(
                f"{longest} steps in a row were skipped (training.max_skipped_steps is {self.max_skipped}); the "
                "weights were not changed by them. A lower optimizer.lr or training.max_norm, or a longer "
                "lr_scheduler.warmup_steps, may help"
            )
        if steps[-1].step > self.state.furthest_step:
            self.state.rewinds = 0
        return Decision.REWIND if rewinds else Decision.CONTINUE

    def rewind(self) -> None:
        """Count a rewind from the present step. Raises RunError if it is one too many."""
        state = self.state
        state.furthest_step = max(state.furthest_step, state.step)
        state.rewinds += 1
        if state.rewinds > self.max_skipped:
            raise RunError(
                f"rewound {state.rewinds - 1} times without getting past step {state.furthest_step} "
                "(training.max_skipped_steps); a lower optimizer.lr or training.max_norm may help"
            )

    def cannot_rewind(self) -> None:
        """There is no checkpoint to rewind to. Raises RunError if too many steps in a row were skipped."""
        in_a_row = self.state.skipped.in_a_row
        if in_a_row > self.max_skipped:
            raise RunError(
                f"{in_a_row} steps in a row were skipped (training.max_skipped_steps), and there is no checkpoint yet "
                "to rewind to"
            )
        self.warn("there is no checkpoint yet to rewind to")
