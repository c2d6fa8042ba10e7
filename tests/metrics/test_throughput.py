"""Utilisation against a peak that is measured again while training, and the time that is left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from torchtitan_style.metrics import log, throughput
from torchtitan_style.metrics.throughput import Meter

RANKS = 2


class Clock:
    """Stands for ``time``; a matrix product takes ``product`` seconds, at ``rate`` FLOP/s."""

    def __init__(self) -> None:
        self.now, self.product, self.rate, self.measured = 0.0, 0.01, 1e9, 0.0

    def perf_counter(self) -> float:
        return self.now

    def peak_flops(self, *_: Any) -> float:
        seconds = 6 * self.product
        self.now += seconds
        self.measured += seconds
        return self.rate


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(log, "time", clock)
    monkeypatch.setattr(throughput.devices, "peak_flops", clock.peak_flops)
    monkeypatch.setattr(dist, "barrier", lambda: None)

    def all_reduce(x: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        if op == dist.ReduceOp.SUM:  # as if all ranks had the same
            x *= RANKS

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return clock


@pytest.fixture
def meter(clock: Clock) -> Meter:
    world: Any = SimpleNamespace(device=torch.device("cpu"))
    return Meter(world, flops_per_token=1e6, dtype=torch.float32)


def mfu(meter: Meter, clock: Clock, *, tokens: int = 100, seconds: float = 100.0) -> float:
    meter.add_tokens(tokens)
    clock.now += seconds
    found: float = meter.read()["mfu"]
    return found


def test_the_best_peak_seen_counts_summed_over_the_ranks(meter: Meter, clock: Clock) -> None:
    assert mfu(meter, clock) == pytest.approx(1e6 / (RANKS * 1e9))
    clock.rate = 4e9  # the other programs have ended
    assert mfu(meter, clock) == pytest.approx(1e6 / (RANKS * 4e9))
    assert meter.describe_peak().startswith("MFU is relative to 8 GFLOP/s")
    clock.rate = 1e9
    assert mfu(meter, clock) == pytest.approx(1e6 / (RANKS * 4e9))


def test_it_is_never_above_one(meter: Meter, clock: Clock) -> None:
    assert mfu(meter, clock, tokens=1_000_000, seconds=100.0) == 1.0
    assert mfu(meter, clock, tokens=500_000, seconds=100.0) == pytest.approx(0.5)


@pytest.mark.parametrize("seconds", [0.01, 0.5, 20.0])
def test_measuring_again_takes_less_than_a_hundredth_of_the_time(meter: Meter, clock: Clock, seconds: float) -> None:
    began, before = clock.now, clock.measured
    for _ in range(500):
        mfu(meter, clock, seconds=seconds)
    assert clock.measured - before < 0.01 * (clock.now - began)
    assert clock.measured > before or seconds == 0.01


def test_an_unknown_device_has_no_utilisation(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput.devices, "peak_flops", lambda *_: None)
    meter = Meter(SimpleNamespace(device=torch.device("cpu")), flops_per_token=1.0, dtype=torch.float32)  # type: ignore[arg-type]
    assert mfu(meter, clock) is None
    assert meter.describe_peak() == ""


def test_the_time_left_leaves_out_the_first_step_and_has_what_is_between_steps(clock: Clock) -> None:
    training: Any = SimpleNamespace(_timed_from=None, last_step=100)
    clock.now = 60.0  # the first step is compiled
    assert log.TrainingLog._seconds_left(training, 1) is None
    clock.now += 9 * 1.0 + 9 * 1.0  # steps, and a validation
    assert log.TrainingLog._seconds_left(training, 10) == pytest.approx(90 * 2.0)
    assert log.TrainingLog._seconds_left(training, 100) == 0.0
