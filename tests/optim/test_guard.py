"""Which steps are admitted, against the definition in plain Python."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from torchtitan_style.optim.guard import StepGuard

CPU = torch.device("cpu")


def admitted(losses: list[float], norms: list[float], *, sigma: float, window: int) -> list[bool]:
    """The definition: a number, and no more than sigma standard deviations above the mean of the last ``window``
    losses that were admitted; anything goes before there are so many."""
    before: list[float] = []
    result = []
    for loss, norm in zip(losses, norms, strict=True):
        sound = math.isfinite(loss) and math.isfinite(norm)
        last = before[-window:]
        if sound and sigma and len(last) == window:
            sound = loss <= statistics.mean(last) + sigma * statistics.stdev(last)
        if sound:
            before.append(loss)
        result.append(sound)
    return result


def decide(guard: StepGuard, losses: list[float], norms: list[float]) -> list[bool]:
    return [bool(guard.admits(torch.tensor(x), torch.tensor(n))) for x, n in zip(losses, norms, strict=True)]


@pytest.mark.parametrize(("sigma", "window"), [(0, 5), (1.5, 2), (2, 5), (4, 20)])
def test_admits_what_the_definition_admits(sigma: float, window: int) -> None:
    draw = random.Random(window)
    odd = [math.nan, math.inf, -math.inf, 50.0]
    losses = [draw.choice(odd) if draw.random() < 0.15 else 5 + draw.gauss(0, 1) for _ in range(300)]
    norms = [draw.choice(odd) if draw.random() < 0.1 else 1.0 for _ in range(300)]
    expected = admitted(losses, norms, sigma=sigma, window=window)
    assert decide(StepGuard(sigma, window, CPU), losses, norms) == expected
    assert 0.15 < sum(expected) / 300 < 0.9
    if sigma:  # spikes are refused that are numbers
        assert any(not e and math.isfinite(x) and math.isfinite(n)
                   for e, x, n in zip(expected, losses, norms, strict=True))  # fmt: skip


@pytest.mark.parametrize("after", [0, 3, 4, 40])
def test_goes_on_from_its_losses_as_if_never_stopped(after: int) -> None:
    draw = random.Random(after)
    losses = [draw.uniform(4, 6) for _ in range(80)]
    norms = [1.0] * 80
    whole, first, second = (StepGuard(1.0, 4, CPU) for _ in range(3))
    decided = decide(first, losses[:after], norms[:after])
    assert len(first.losses) == min(4, sum(decided))
    second.losses = first.losses
    assert decided + decide(second, losses[after:], norms[after:]) == decide(whole, losses, norms)


def test_a_window_of_another_size_takes_the_newest() -> None:
    guard = StepGuard(1.0, 3, CPU)
    guard.losses = [1.0, 2.0, 3.0, 4.0]
    assert guard.losses == [2.0, 3.0, 4.0]
    guard.losses = [5.0]
    assert guard.losses == [5.0]
    assert StepGuard(0, 3, CPU).losses == []
