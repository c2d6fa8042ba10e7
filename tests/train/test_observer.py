"""Callbacks: every registered observer is told, with what the moment is about."""

from __future__ import annotations

from typing import Any

import pytest

from torchtitan_style.train import observer
from torchtitan_style.train.observer import MOMENTS, Observer, observe, observers


@pytest.fixture(autouse=True)
def nobody_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "_registered", [])


def test_without_observers_every_moment_passes() -> None:
    assert "after_backward" in MOMENTS
    for of in (Observer(), observers()):
        of.after_start()
        of.before_step(1)
        of.after_backward(1, None, None)  # type: ignore[arg-type]


def test_all_observers_are_told_in_the_order_of_registration() -> None:
    told: list[Any] = []

    class Steps(Observer):
        def __init__(self, name: str) -> None:
            self.name = name

        def before_step(self, step: int) -> None:
            told.append((self.name, step))

    observe(Steps("a"))
    observe(Steps("b"))
    both = observers()
    both.before_step(7)
    both.before_save(7)
    assert told == [("a", 7), ("b", 7)]


def test_an_error_of_an_observer_is_the_run_s() -> None:
    class Strict(Observer):
        def before_save(self, step: int) -> None:
            raise ValueError("no")

    observe(Strict())
    with pytest.raises(ValueError, match="no"):
        observers().before_save(1)
