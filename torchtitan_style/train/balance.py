"""The router's losses over a whole optimizer step, whichever rank or microbatch has its tokens.

The load-balancing loss is E · Σₑ fₑ · Pₑ, where fₑ is the share of all tokens of all layers that are routed to expert
e, and Pₑ the mean of the router's probabilities for it (Fedus et al. 2021, equations 4 to 6; over all layers, as in
Transformers). It is over the global batch: within a microbatch balance would be asked of each single text, and keep
experts from specialising (Qiu et al. 2025; Qwen3 Technical Report, section 2). Pₑ is a mean over tokens, so
microbatches and ranks add their parts of it like those of any loss. fₑ has no gradient, but every part of the loss
has it as a factor. So the counts of the whole step must be known before the first backward pass: those of the first
microbatch are known after its forward pass, and the others, if there are any, have one more forward pass beforehand.

Shapes: L layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_style.data.loader import Microbatch
from torchtitan_style.distributed.world import World


def balance_loss(counts: Tensor, probabilities: Tensor, rows: Tensor | float) -> Tensor:
    """E · Σₑ fₑ · Pₑ, or the part of it that some tokens have.

    counts: [E], of all tokens of all layers. probabilities: [E], summed over all tokens of all layers, or over some.
    rows: how many all tokens of all layers are.
    """
    return len(counts) * (counts / rows * (probabilities / rows)).sum()


class Balance:
    """Of one step. ``start`` it before the first forward pass, and add ``loss`` to the loss of each microbatch.

    All ranks call these together. The sums over ranks are taken over all of them: each has other tokens, or, under
    tensor parallelism, other positions.
    """

    def __init__(self, model: Any, microbatches: Sequence[Microbatch], world: World) -> None:
        self.model, self.config = model, model.config
        self.microbatches = microbatches
        tokens = sum(part.inputs.numel() for part in microbatches) * world.layout.dp * world.layout.cp
        self.rows = tokens * self.config.num_sparse_layers
        self._counts: Tensor | None = None
        """[E], of the whole step."""
        self._other_counts: Tensor | None = None
        """[E], of all of this rank's microbatches but the first."""
        self._sums: Tensor | None = None
        """[L, 2E + 2]; see ``sums``."""

    @classmethod
    def of(cls, model: Any, microbatches: Sequence[Microbatch], world: World) -> Balance | None:
        """None if the model has no experts."""
        return cls(model, microbatches, world) if hasattr(getattr(model, "model", None), "routing") else None

    @torch.no_grad()
    def start(self) -> None:
        """Route all microbatches but the first, for the counts alone."""
        if self.config.router_aux_loss_coef:
            for microbatch in self.microbatches[1:]:
                self.model(*microbatch)
                counts = self._stacked("counts").double().sum(0)
                self._other_counts = counts if self._other_counts is None else self._other_counts + counts

    def loss(self) -> Tensor:
        """What the microbatch of the last forward pass has of the router's losses; 0-dim fp32, differentiable."""
        with torch.no_grad():
            names = "counts", "probabilities", "z", "entropy"
            sums = torch.cat([self._stacked(name).double().flatten(1) for name in names], dim=1)
            self._sums = sums if self._sums is None else self._sums + sums
        total = torch.zeros((), device=sums.device)
        if coefficient := self.config.router_aux_loss_coef:
            if self._counts is None:
                counts = self._stacked("counts").double().sum(0)
                self._counts = counts if self._other_counts is None else counts + self._other_counts
                dist.all_reduce(self._counts)
            probabilities = self._stacked("probabilities").sum(0)
            total = total + coefficient * balance_loss(self._counts.float(), probabilities, self.rows)
        if coefficient := self.config.router_z_loss_coef:
            total = total + coefficient * self._stacked("z").sum() / self.rows
        return total

    def sums(self) -> Tensor:
        """Sums over all tokens of the step, the same on all ranks: [L, 2E + 2] fp64, for each layer with experts the
        tokens of each expert, its probabilities, log² of the normaliser, and the entropy."""
        assert self._sums is not None
        dist.all_reduce(self._sums)
        return self._sums

    def _stacked(self, name: str) -> Tensor:
        """``name`` of ``Routing`` of the last forward pass, [L, …]."""
        found = torch.stack([getattr(routing, name) for routing in self.model.model.routing])
        return found if found.ndim > 1 else found[:, None]
