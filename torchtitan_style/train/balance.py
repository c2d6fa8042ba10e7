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
from torchtitan_style.distributed.pipeline import PipelinedModel
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
    tensor parallelism, other positions, or, in a pipeline, other layers.

    A pipeline begins the backward pass of the first microbatch before the forward pass of the last, and no stage sees
    the layers of the others. There all microbatches have one more forward pass beforehand, and each stage adds the
    loss of its own layers: the loss is a sum over layers, as it is over tokens.
    """

    def __init__(self, model: Any, microbatches: Sequence[Microbatch], world: World) -> None:
        self.model, self.config = model, model.config
        self.microbatches = microbatches
        self.is_pipelined = isinstance(model, PipelinedModel)
        self.parts = [part.model for part in model.parts] if self.is_pipelined else [model.model]
        """The models of this rank's stages; the one model, if there are no stages."""
        tokens = sum(part.inputs.numel() for part in microbatches) * world.layout.dp * world.layout.cp
        self.rows = tokens * self.config.num_sparse_layers
        self._counts: Tensor | None = None
        """[E], of the whole step."""
        experts = self.config.num_experts
        self._other_counts = torch.zeros(experts, dtype=torch.float64, device=world.device)
        """[E], of those of this rank's microbatches that ``start`` has routed."""
        sizes = self.config.num_sparse_layers, 2 * experts + 2
        self._sums = torch.zeros(sizes, dtype=torch.float64, device=world.device)
        """[L, 2E + 2]; see ``sums``."""

    @classmethod
    def of(cls, model: Any, microbatches: Sequence[Microbatch], world: World) -> Balance | None:
        """None if the model has no experts."""
        part = model.parts[0] if isinstance(model, PipelinedModel) else model
        return cls(model, microbatches, world) if hasattr(getattr(part, "model", None), "routing") else None

    @torch.no_grad()
    def start(self) -> None:
        """Route all microbatches but the first, or all of a pipeline's, for the counts alone."""
        if not self.config.router_aux_loss_coef:
            return
        for microbatch in self.microbatches[0 if self.is_pipelined else 1 :]:
            self.model(*microbatch)
            for part in self.parts:
                if part.routing:  # a stage may have no experts
                    self._other_counts += _counts(part)
        if self.is_pipelined:
            self._counts = self._other_counts
            dist.all_reduce(self._counts)

    def loss(self, part: Any) -> Tensor:
        """What the layers of ``part``, one of ``parts``, have of the router's losses of the microbatch of its last
        forward pass; 0-dim fp32, differentiable."""
        total = torch.zeros((), device=self._sums.device)
        if not part.routing:  # a stage without experts
            return total
        with torch.no_grad():
            names = "counts", "probabilities", "z", "entropy"
            sums = torch.cat([_stacked(part, name).double().flatten(1) for name in names], dim=1)
            self._sums[self._sparse_layers(part)] += sums
        if coefficient := self.config.router_aux_loss_coef:
            if self._counts is None:
                self._counts = self._other_counts + _counts(part)
                dist.all_reduce(self._counts)
            probabilities = _stacked(part, "probabilities").sum(0)
            total = total + coefficient * balance_loss(self._counts.float(), probabilities, self.rows)
        if coefficient := self.config.router_z_loss_coef:
            total = total + coefficient * _stacked(part, "z").sum() / self.rows
        return total

    def sums(self) -> Tensor:
        """Sums over all tokens of the step, the same on all ranks: [L, 2E + 2] fp64, for each layer with experts the
        tokens of each expert, its probabilities, log² of the normaliser, and the entropy."""
        dist.all_reduce(self._sums)
        return self._sums

    def _sparse_layers(self, part: Any) -> list[int]:
        """Of all layers with experts, which ones ``part`` has, from 0."""
        sparse = [i for i in range(self.config.num_hidden_layers) if self.config.is_sparse(i)]
        return [place for place, i in enumerate(sparse) if part.layers[i] is not None]


def _stacked(part: Any, name: str) -> Tensor:
    """``name`` of ``Routing`` of the last forward pass of ``part``, [L, …]."""
    found = torch.stack([getattr(routing, name) for routing in part.routing])
    return found if found.ndim > 1 else found[:, None]


def _counts(part: Any) -> Tensor:
    """For each expert the tokens of the last forward pass of ``part``, of all its layers; [E] fp64."""
    return _stacked(part, "counts").double().sum(0)
