"""The learning rate, against the sequence that its definition spells out."""

from __future__ import annotations

import itertools
import math

import pytest

from torchtitan_style.config.schema import LRScheduler
from torchtitan_style.optim.schedule import lr_factor

SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "sqrt": lambda x: 1 - math.sqrt(x),
}


def factors(steps: int, **settings: object) -> list[float]:
    return [lr_factor(step, LRScheduler(**settings), total_steps=steps) for step in range(1, steps + 1)]


def spelled_out(warmup: int, stable: int, decay: int, shape: str, floor: float) -> list[float]:
    """Step by step: up to 1 one step after warm-up, down to ``floor`` one step past the end."""
    return [
        *(i / (warmup + 1) for i in range(1, warmup + 1)),
        *[1.0] * stable,
        *(floor + (1 - floor) * SHAPES[shape](i / (decay + 1)) for i in range(1, decay + 1)),
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("warmup", "ratio", "stable", "decay"),
    [
        (10, None, 0, 90),  # everything after warm-up
        (0, None, 0, 100),
        (10, 0.2, 70, 20),  # warm-up-stable-decay
        (0, 0.5, 50, 50),
        (10, 0.0, 90, 0),  # constant
        (10, 1.0, 0, 90),  # no room: decay starts after warm-up
        (99, 0.5, 0, 1),
        (100, None, 0, 0),
    ],
)
def test_sequence_is_the_one_spelled_out(
    shape: str, floor: float, warmup: int, ratio: float | None, stable: int, decay: int
) -> None:
    got = factors(100, warmup_steps=warmup, decay_type=shape, decay_ratio=ratio, min_lr_factor=floor)
    # Both are a few fp64 operations on numbers of at most 1.
    assert got == pytest.approx(spelled_out(warmup, stable, decay, shape, floor), rel=0, abs=1e-14)


@pytest.mark.parametrize("warmup", [0, 50, 99, 100, 150, 500])
def test_past_its_end_it_stays_at_the_floor(warmup: int) -> None:
    got = factors(300, warmup_steps=warmup, total_steps=100, min_lr_factor=0.25)
    assert got[100:] == [0.25] * 200
    assert factors(300, warmup_steps=warmup, total_steps=100, decay_ratio=0.0)[-1] == min(1.0, 300 / (warmup + 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [None, 0.0, 0.03, 0.3, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 20, 99])
def test_it_stays_in_bounds_and_never_jumps(shape: str, ratio: float | None, warmup: int) -> None:
    got = factors(100, warmup_steps=warmup, decay_type=shape, decay_ratio=ratio)
    assert all(0 < factor <= 1 for factor in got)  # at 0 a step would be wasted
    decay = min(100 - warmup, 100 if ratio is None else round(100 * ratio))
    # The steepest step: of warm-up; of cosine in its middle (slope pi / 2); of sqrt at its beginning.
    steepest = {"linear": 1 / (decay + 1), "cosine": math.pi / 2 / (decay + 1), "sqrt": math.sqrt(1 / (decay + 1))}
    bound = max(1 / (warmup + 1) if warmup else 0.0, steepest[shape] if decay else 0.0)
    assert max(abs(b - a) for a, b in itertools.pairwise(got)) <= bound + 1e-14


def test_warm_up_longer_than_the_run_only_rises() -> None:
    got = factors(10, warmup_steps=39)
    assert got == pytest.approx([i / 40 for i in range(1, 11)], rel=0, abs=1e-15)


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_total_steps_lays_the_schedule_out_for_another_length(ratio: float | None) -> None:
    settings = {"warmup_steps": 10, "decay_ratio": ratio, "min_lr_factor": 0.1}
    longer = factors(200, **settings)
    assert factors(60, total_steps=200, **settings) == longer[:60]
    beyond = factors(300, total_steps=200, **settings)
    assert beyond[:200] == longer
    assert beyond[200:] == pytest.approx([0.1] * 100, rel=1e-14)  # past its end it stays at the bottom
