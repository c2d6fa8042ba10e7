"""Faults of one rank or all, for ``zygote.py``.

Each is a dict: "kind", the name of a function here; "rank", whose it is (left out: every rank's); its arguments.
A fault that is to be seen from outside leaves a file, "mark".
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torchtitan_style.train.observer import Observer, observe


def inject(faults: list[dict[str, Any]]) -> None:
    for fault in faults:
        if fault.pop("rank", rank()) == rank():
            globals()[fault.pop("kind")](**fault)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def at(moment: str, action: Callable[..., None]) -> None:
    """Call ``action`` at a moment of the run: a method of ``Observer``, with its arguments."""
    observer = Observer()
    assert hasattr(observer, moment)
    setattr(observer, moment, action)
    observe(observer)


def in_the_step(steps: Sequence[int] | None, action: Callable[..., None]) -> None:
    """Call ``action(model, loss)`` after the backward pass of these steps (None: all), before clipping."""

    def after_backward(step: int, model: Any, loss: Any) -> None:
        if steps is None or step in steps:
            action(model, loss)

    at("after_backward", after_backward)


def nan_gradient(steps: list[int] | None = None) -> None:
    def spoil(model: Any, _: Any) -> None:
        local(next(model.parameters()).grad).view(-1)[:1].fill_(float("nan"))

    in_the_step(steps, spoil)


def local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def high_loss(steps: list[int], factor: float, times: int | None = None) -> None:
    left = times

    def scale(_: Any, loss: Any) -> None:
        nonlocal left
        if left != 0:
            loss.mul_(factor)
            left = left and left - 1

    in_the_step(steps, scale)


def stop_in_rewind() -> None:
    """SIGTERM as the run goes back after a spike."""
    at("before_rewind", lambda step: os.kill(os.getpid(), signal.SIGTERM))


def die(steps: list[int], once: str) -> None:
    """SIGKILL in a step; ``once``: a file that says that it has happened."""

    def kill(*_: Any) -> None:
        if not Path(once).exists():
            Path(once).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    in_the_step(steps, kill)


def hang(steps: list[int], mark: str) -> None:
    def sleep_for_ever(*_: Any) -> None:
        Path(mark).touch()
        while True:
            time.sleep(1)

    in_the_step(steps, sleep_for_ever)


def slow_steps(seconds: float) -> None:
    in_the_step(None, lambda *_: time.sleep(seconds))


# Faults that hold a rank up, so that something can be done to it at that moment. "mark" with the rank behind it is
# there once it is held. It goes on when the file with "go" behind it appears, or, unless it is stubborn, when it is
# told to stop; "told" and the rank say that it was.


def held(mark: str, stubborn: bool = False) -> None:
    from torchtitan_style.train.stopping import told_to_stop

    mine = Path(f"{mark}.{rank()}")
    if mine.exists():  # once
        return
    mine.touch()
    while not Path(f"{mark}.go").exists() and (stubborn or not told_to_stop()):
        time.sleep(0.01)
        if told_to_stop():
            Path(f"{mark}.told.{rank()}").touch()


def hold_step(step: int, mark: str, stubborn: bool = False) -> None:
    in_the_step([step], lambda *_: held(mark, stubborn))


def hold_validation(step: int, mark: str) -> None:
    """Before its first batch goes through the model."""
    at("before_validation_batch", lambda now: held(mark) if now == step else None)


def hold_save(step: int, mark: str, stubborn: bool = False) -> None:
    """Before the first file is written. From a thread, if the save is asynchronous."""
    at("before_save", lambda now: held(mark, stubborn) if now == step else None)


def mark_save(step: int, mark: str) -> None:
    """Leave "mark" with the rank behind it when the save of ``step`` has ended, whichever way."""
    at("after_save", lambda now: Path(f"{mark}.{rank()}").touch() if now == step else None)


def hold_start(mark: str) -> None:
    """When the loader's workers are on their way."""
    at("after_start", lambda: held(mark))


def save_what_was_loaded(folder: str) -> None:
    """Write once more all that a resume has read."""
    import torch.distributed.checkpoint as dcp

    at("after_load", lambda step, tensors: dcp.save(tensors, checkpoint_id=folder))
