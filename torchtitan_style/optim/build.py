"""Which parameter is updated how: AdamW or Muon, decayed or not, at which learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchtitan_style.config.schema import LRScheduler, Optimizer
from torchtitan_style.config.schema import Muon as MuonConfig

from .adamw import adamw, step_if_finite
from .muon import Muon
from .schedule import lr_factor

__all__ = ["Optimizers", "is_hidden_matrix", "rows_together"]


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes it: a matrix of attention or MLP, not the embedding nor the head."""
    return parameter.ndim == 2 and ".layers." in f".{name}"


def rows_together(name: str, config: MuonConfig, *, head_dim: int) -> int | None:
    """How many rows of matrix ``name`` Muon takes as a matrix of their own: a head's, or None for all."""
    has_heads = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    return head_dim if config.per_head and has_heads else None


class Optimizers:
    """The optimizers of a model, as one. Made by all ranks together.

    total_steps: of the run, for the schedules. dtype: what the model computes in, which Muon takes for its
    matrix multiplications. head_dim: the model's, for optimizer.muon.per_head.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Optimizer,
        scheduler: LRScheduler,
        *,
        total_steps: int,
        dtype: torch.dtype,
        head_dim: int,
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hidden = {n: p for n, p in named.items() if config.name == "muon" and is_hidden_matrix(n, p)}
        self.scheduler, self.total_steps = scheduler, total_steps
        self.adamw = adamw({n: p for n, p in named.items() if n not in hidden}, config)
        self.muon: Muon | None = None
        self.peaks = {"lr": config.lr}
        if hidden:
            self.muon = Muon(
                list(hidden.values()),
                config.muon,
                lr=config.muon_lr,
                weight_decay=config.muon_weight_decay,
                dtype=dtype,
                head_dims=[rows_together(name, config.muon, head_dim=head_dim) for name in hidden],
            )
            self.muon_scheduler = config.muon.schedule(scheduler)
            self.peaks["lr_muon"] = config.muon_lr

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]:
        """Of each parameter, tensors by name."""
        return {**self.adamw.state, **(self.muon.state if self.muon else {})}

    def zero_grad(self) -> None:
        for optimizer in (self.adamw, self.muon):
            if optimizer is not None:
                optimizer.zero_grad()

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """Those of ``step`` (from 1), by the name they have in the metrics."""
        rates = {"lr": self.peaks["lr"] * lr_factor(step, self.scheduler, total_steps=self.total_steps)}
        for group in self.adamw.param_groups:
            group["lr"] = rates["lr"]
        if self.muon:
            factor = lr_factor(step, self.muon_scheduler, total_steps=self.total_steps)
            rates["lr_muon"] = self.peaks["lr_muon"] * factor
            self.muon.param_groups[0]["lr"] = rates["lr_muon"]
        return rates

    def step_if_finite(self, grad_norm: Tensor) -> None:
        """Update all weights, or none and no state if ``grad_norm``, which is the same on all ranks, is not finite."""
        step_if_finite(self.adamw, grad_norm)
        if self.muon:
            self.muon.step_if_finite(grad_norm)
