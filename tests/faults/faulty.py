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

now = 0
"""The step under way."""


def inject(faults: list[dict[str, Any]]) -> None:
    import torchtitan_style.train.trainer as trainer

    real = trainer.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        global now
        now = kwargs["step"]
        return real(*args, **kwargs)

    trainer.train_step = train_step
    for fault in faults:
        if fault.pop("rank", rank()) == rank():
            globals()[fault.pop("kind")](**fault)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def in_the_step(steps: Sequence[int] | None, action: Callable[..., None]) -> None:
    """Call ``action(gradients, loss)`` after the backward pass of these steps (None: all), before clipping."""
    import torchtitan_style.train.step as step

    real = step.clip_grad_norm_

    def clip(parameters: Any, max_norm: float, *, beside: Any) -> Any:
        parameters = list(parameters)
        if steps is None or now in steps:
            action([p.grad for p in parameters], beside)
        return real(parameters, max_norm, beside=beside)

    step.clip_grad_norm_ = clip


def nan_gradient(steps: list[int] | None = None) -> None:
    in_the_step(steps, lambda gradients, _: local(gradients[0]).view(-1)[:1].fill_(float("nan")))


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
    from torchtitan_style.train.trainer import Trainer

    real = Trainer._rewind

    def rewind(trainer: Trainer) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(trainer)

    Trainer._rewind = rewind  # type: ignore[method-assign]


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
    import torchtitan_style.train.trainer as trainer

    real = trainer.validate

    def validate(model: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
        def slow_model(*inputs: Any) -> Any:
            if now == step:
                held(mark)
            return model(*inputs)

        return real(slow_model, batches, *args, **kwargs)

    trainer.validate = validate


def hold_save(step: int, mark: str, stubborn: bool = False) -> None:
    """Before the first file is written. From a thread, if the save is asynchronous."""
    import torchtitan_style.checkpoint.writer as writer

    real = writer.HashingWriter.write_data

    def write_data(self: Any, *args: Any) -> Any:
        if Path(self.path).name == f"tmp-step-{step}":
            held(mark, stubborn)
        return real(self, *args)

    writer.HashingWriter.write_data = write_data  # type: ignore[method-assign]


def mark_save(step: int, mark: str) -> None:
    """Leave "mark" with the rank behind it when the save of ``step`` has ended, whichever way."""
    from torchtitan_style.checkpoint.checkpointer import Checkpointer

    real = Checkpointer._write

    def write(self: Any, of: int, *args: Any) -> None:
        try:
            real(self, of, *args)
        finally:
            if of == step:
                Path(f"{mark}.{rank()}").touch()

    Checkpointer._write = write  # type: ignore[method-assign]


def hold_start(mark: str) -> None:
    """When the loader's workers are on their way."""
    import torchtitan_style.data.loader as loader

    real = loader.Loader.start

    def start(self: Any, state: Any) -> None:
        real(self, state)
        held(mark)

    loader.Loader.start = start  # type: ignore[method-assign]


def save_what_was_loaded(folder: str) -> None:
    """Write once more all that a resume has read."""
    import torch.distributed.checkpoint as dcp

    from torchtitan_style.checkpoint.checkpointer import Checkpointer

    real = Checkpointer.load

    def load(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        dcp.save(self._tensors(), checkpoint_id=folder)

    Checkpointer.load = load  # type: ignore[method-assign]
