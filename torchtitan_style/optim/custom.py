"""An optimizer of the user's own, any ``torch.optim.Optimizer``, in the place of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class CustomOptimizer:
    """Steps that can be left out, and a state that exists before the first one, so that a checkpoint can be read into
    it. Whether a step is taken is read on the host: each step waits for the device."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
        self.optimizer = optimizer
        self._make_state(parameters)

    @torch.no_grad()
    def _make_state(self, parameters: Sequence[Tensor]) -> None:
        """Take a step with gradients and rates of zero, which makes the state, and put back what it has counted."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        before = [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
        for state in self.state.values():
            for tensor in state.values():
                tensor.zero_()

    @property
    def state(self) -> Mapping[Tensor, dict[str, Tensor]]:
        """Of each parameter, tensors by name: what checkpoints hold."""
        every: Mapping[Any, Mapping[str, Any]] = self.optimizer.state
        return {p: {k: v for k, v in state.items() if isinstance(v, Tensor)} for p, state in every.items()}

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step_if(self, taken: Tensor, lr: Tensor) -> None:
        """Update all weights with the learning rate ``lr``, or none of them and no state."""
        if not bool(taken):
            return
        for group in self.optimizer.param_groups:
            group["lr"] = float(lr)
        self.optimizer.step()
