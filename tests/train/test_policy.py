"""What is done about bad steps: skip, rewind, stop."""

from __future__ import annotations

import math
from typing import Any

import pytest

from torchtitan_style.common.errors import RunError
from torchtitan_style.config.schema import Training
from torchtitan_style.metrics.log import StepFigures
from torchtitan_style.train.policy import Decision, StepPolicy
from torchtitan_style.train.state import SkippedSteps, TrainState

CONTINUE, REWIND = Decision.CONTINUE, Decision.REWIND


class Steps:
    """A run, as the policy sees it: one letter a step. "." taken, "n" not finite, "s" a spike."""

    def __init__(self, action: str = "skip", *, limit: int = 2, state: TrainState | None = None) -> None:
        self.state = state or TrainState()
        self.warnings: list[str] = []
        config = Training(max_skipped_steps=limit, spike_action=action)
        self.policy = StepPolicy(config, self.state, warn=self.warnings.append)

    def __call__(self, letters: str) -> Decision:
        """Review these steps at once, as between two lines of the log."""
        figures = []
        for letter in letters:
            self.state.step += 1
            figures.append(figures_of(self.state.step, letter))
        return self.policy.review(figures)


def figures_of(step: int, letter: str) -> StepFigures:
    loss = {".": 2.0, "n": math.nan, "s": 99.0}[letter]
    return StepFigures(step, 64 * step, loss, 1.0, letter == ".", update=step, batch_hash=0)


def test_taken_steps_change_nothing() -> None:
    steps = Steps()
    assert steps("....") is CONTINUE
    assert steps("") is CONTINUE
    assert steps.state == TrainState(step=4)
    assert steps.warnings == []


@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_a_step_that_is_not_finite_stays_skipped(action: str) -> None:
    steps = Steps(action)
    assert steps(".n.nn.") is CONTINUE
    assert steps.state.skipped == SkippedSteps(total=3, in_a_row=0)
    assert steps.warnings == [f"step {n} was skipped: loss nan, gradient norm 1: not finite" for n in (2, 4, 5)]


def test_a_spike_is_skipped_or_rewound_from() -> None:
    for action, decision in (("skip", CONTINUE), ("rewind", REWIND)):
        steps = Steps(action)
        assert steps(".s.") is decision
        assert steps.state.skipped == SkippedSteps(total=1, in_a_row=0)
        assert steps.warnings == ["step 2 was skipped: loss 99, gradient norm 1: a spike (training.spike_sigma)"]
        assert steps("..") is CONTINUE  # once


@pytest.mark.parametrize("reviews", [[".nnn"], [".nnn.."], [".nn", "n"], ["n.nn", "n..."], [".n", "n", "n"], ["nsn"]])
def test_too_many_in_a_row_stop_the_run_wherever_the_log_is_read(reviews: list[str]) -> None:
    steps = Steps(limit=2)
    for letters in reviews[:-1]:
        assert steps(letters) is CONTINUE
    with pytest.raises(RunError, match=r"^3 steps in a row were skipped \(training.max_skipped_steps is 2\); the weig"):
        steps(reviews[-1])


def test_as_many_as_are_allowed_do_not_stop_it() -> None:
    steps = Steps(limit=2)
    for letters in (".nn", ".n", "n.n", ".nn."):
        assert steps(letters) is CONTINUE
    steps = Steps(limit=0)
    assert steps("..") is CONTINUE
    with pytest.raises(RunError, match=r"^1 steps in a row"):
        steps("n")


def test_skipped_steps_before_a_resume_count() -> None:
    steps = Steps(limit=2, state=TrainState(step=7, skipped=SkippedSteps(4, 2)))
    with pytest.raises(RunError, match=r"^3 steps in a row"):
        steps("n")
    steps = Steps(limit=1, state=TrainState(step=7, skipped=SkippedSteps(4, 2)))
    assert steps("") is CONTINUE  # with no step since, there is nothing to judge
    assert steps(".") is CONTINUE  # a limit that was lowered is no reason to stop once a step is taken


def test_many_spikes_in_a_row_are_rewound_from_and_not_an_end() -> None:
    assert Steps("rewind", limit=2)("ssss") is REWIND
    with pytest.raises(RunError):
        Steps("skip", limit=2)("ssss")
    with pytest.raises(RunError):  # but what is not finite is no reason to rewind
        Steps("rewind", limit=2)("nnn")


def rewound(steps: Steps, to: int) -> None:
    steps.policy.rewind()
    steps.state.rewind_to(TrainState(step=to, skipped=SkippedSteps(1, 0)))


def test_rewinds_that_do_not_get_past_the_spike_stop_the_run() -> None:
    steps = Steps("rewind", limit=2)
    for _ in range(2):
        steps("." * (9 - steps.state.step))
        assert steps("s") is REWIND  # at step 10
        rewound(steps, to=8)
        assert steps.state.skipped == SkippedSteps(1, 0)
    assert (steps.state.rewinds, steps.state.furthest_step) == (2, 10)
    assert steps(".s") is REWIND
    with pytest.raises(RunError, match=r"^rewound 2 times without getting past step 10"):
        steps.policy.rewind()


def test_getting_past_the_spike_starts_the_count_again() -> None:
    steps = Steps("rewind", limit=1, state=TrainState(step=9))
    assert steps("s") is REWIND
    rewound(steps, to=8)
    assert steps("..") is CONTINUE
    assert steps.state.rewinds == 1  # step 10 again, not past it
    assert steps("s") is REWIND
    assert steps.state.rewinds == 0
    rewound(steps, to=8)
    assert (steps.state.rewinds, steps.state.furthest_step) == (1, 11)


def test_without_a_checkpoint_spikes_are_skipped_up_to_the_limit() -> None:
    steps = Steps("rewind", limit=2)
    for letter in "ss":
        assert steps(letter) is REWIND
        steps.policy.cannot_rewind()
        assert steps.warnings[-1] == "there is no checkpoint yet to rewind to"
    assert steps("s") is REWIND
    with pytest.raises(RunError, match=r"^3 steps in a row were skipped .*, and there is no checkpoint yet to rewind"):
        steps.policy.cannot_rewind()


def test_a_rewind_restores_all_but_the_data_and_the_count_of_rewinds() -> None:
    state = TrainState(step=10, rows_seen=40, best_val_loss=1.0, validated_step=10, went_back_to=4, data={"rows": [40]})
    saved = TrainState(
        step=8, rows_seen=32, best_val_loss=2.0, validated_step=8, skipped=SkippedSteps(1, 1), recent_losses=[3.0],
        went_back_to=2, data={"rows": [32]},
    )  # fmt: skip
    state.rewinds, state.furthest_step = 1, 10
    state.rewind_to(saved)
    expected: dict[str, Any] = {**vars(saved), "rows_seen": 40, "data": {"rows": [40]}, "went_back_to": 4}
    assert vars(state) == expected | {"rewinds": 1, "furthest_step": 10}


@pytest.mark.parametrize(
    ("losses", "best"),
    [([3.0, 2.0, 2.0, 1.0], [True, True, False, True]), ([math.nan, 2.0, math.inf], [False, True, False])],
)
def test_the_lowest_finite_validation_loss_is_the_best(losses: list[float], best: list[bool]) -> None:
    state = TrainState(step=5)
    assert [state.update_best(loss) for loss in losses] == best
    assert state.validated_step == 5
    assert state.best_val_loss == min(loss for loss in losses if math.isfinite(loss))
