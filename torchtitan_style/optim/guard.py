"""Which steps are taken: those whose loss and gradient are numbers, and whose loss is no spike.

Decided on the device, without waiting for it, from figures that are the same on all ranks. What else to do about bad
steps is decided later, by train/policy.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["StepGuard"]


class StepGuard:
    """sigma: a loss so many standard deviations above the mean of the last ``window`` losses is a spike; 0: none is."""

    def __init__(self, sigma: float, window: int, device: torch.device) -> None:
        self.sigma = sigma
        self._losses = torch.full((window,), torch.nan, device=device)  # of steps that were taken, the last at the end

    def admits(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether to take the step: a 0-dim bool. loss: the mean over all tokens; both 0-dim fp32."""
        sound = torch.isfinite(loss) & torch.isfinite(grad_norm)
        if not self.sigma:
            return sound
        limit = self._losses.mean() + self.sigma * self._losses.std()
        sound = sound & ~(loss > limit)  # comparing with NaN, while there are too few to compare with, is false
        following = torch.cat((self._losses[1:], loss[None]))
        self._losses = torch.where(sound, following, self._losses)
        return sound

    @property
    def losses(self) -> list[float]:
        """Those that the next one will be compared with. Waits for the device."""
        return [loss for loss in self._losses.tolist() if loss == loss] if self.sigma else []

    @losses.setter
    def losses(self, losses: list[float]) -> None:
        self._losses.fill_(torch.nan)
        if losses := losses[-len(self._losses) :]:
            self._losses[-len(losses) :] = torch.tensor(losses)
