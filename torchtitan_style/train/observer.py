"""The hook for code of one's own in the training loop."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["NO_OBSERVER", "Observer", "observe", "observers"]


class Observer:
    """Is told of moments of a run, on every rank. This is where a callback of one's own goes.

    Override the methods you need and register an instance before training starts:

        class PrintLargestGradient(Observer):
            def after_backward(self, step, model, loss):
                print(max(p.grad.abs().max().item() for p in model.parameters()))

        observe(PrintLargestGradient())

    The methods run inside the loop and hold it up while they run. Reading a tensor (``.item()``) waits for the device;
    a collective must be called by all ranks. A method may raise UserError or RunError to end the run.
    """

    def after_start(self) -> None:
        """The loader's workers are started and the checkpoint, if any, is loaded; nothing is written yet."""

    def after_load(self, step: int, tensors: dict[str, Tensor]) -> None:
        """The checkpoint of ``step`` was read into ``tensors``: weights and optimizer state by name, on this rank."""

    def before_step(self, step: int) -> None:
        """The step begins; its batch is not read yet. ``step`` counts from 1."""

    def after_backward(self, step: int, model: nn.Module, loss: Tensor) -> None:
        """The gradients of the step are accumulated but not clipped; both they and ``loss`` may be changed in place.

        loss: this rank's share of the step's loss, 0-dim fp64.
        """

    def before_validation_batch(self, step: int) -> None:
        """A batch of held-out rows is about to go through the model, after training ``step``."""

    def before_save(self, step: int) -> None:
        """The files of a checkpoint are about to be written; in the background from another thread."""

    def after_save(self, step: int) -> None:
        """The save of ``step`` has ended, with or without an error; in the background from another thread."""

    def before_rewind(self, step: int) -> None:
        """After the loss spike at ``step`` the run is about to go back to its newest checkpoint."""


NO_OBSERVER = Observer()
MOMENTS = [name for name in vars(Observer) if not name.startswith("_")]

_registered: list[Observer] = []


def observe(observer: Observer) -> None:
    """Have the runs of this process tell ``observer``."""
    _registered.append(observer)


def observers() -> Observer:
    """All that were registered, as one."""
    return _Several(_registered)


class _Several(Observer):
    def __init__(self, observers: Iterable[Observer]) -> None:
        for moment in MOMENTS:
            setattr(self, moment, partial(_tell, [getattr(observer, moment) for observer in observers]))


def _tell(listeners: list[Any], *arguments: Any) -> None:
    for listener in listeners:
        listener(*arguments)
