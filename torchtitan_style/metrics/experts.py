"""How evenly the experts of a mixture are used: figures of a step, and a warning about those that are not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_IDLE_STEPS = 100
"""An expert that gets nothing for so many steps is reported."""


class ExpertUse:
    """Reads the sums of ``train/balance.py`` on the host, step by step."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self._idle: Tensor | None = None
        """[L, E]: steps in a row without a token."""

    def figures(self, step: int, sums: Tensor, *, sparse_layers: list[int], experts_per_token: int) -> dict[str, Any]:
        """What metrics.jsonl has of a step: ``aux_loss``, and lists with a number for each layer with experts.

        sums: [L, 2E + 2]. sparse_layers: the numbers of the L layers.
        """
        experts = (sums.shape[1] - 2) // 2
        counts, probabilities, _, entropy = sums.split((experts, experts, 1, 1), dim=1)
        tokens = counts.sum(1, keepdim=True) / experts_per_token  # [L, 1]
        rows = tokens.sum()
        aux_loss = experts * (counts.sum(0) / rows * (probabilities.sum(0) / rows)).sum()
        shares = counts / counts.sum(1, keepdim=True)
        self._watch(step, counts, sparse_layers)
        return {
            "aux_loss": aux_loss.item(),
            "busiest_expert_share": shares.amax(1).tolist(),
            "idlest_expert_share": shares.amin(1).tolist(),
            "router_entropy": (entropy / tokens).flatten().tolist(),
        }

    def _watch(self, step: int, counts: Tensor, sparse_layers: list[int]) -> None:
        idle = torch.zeros_like(counts) if self._idle is None else self._idle
        self._idle = torch.where(counts > 0, 0, idle + 1)
        for layer, row in zip(sparse_layers, self._idle, strict=True):
            if unused := (row == _IDLE_STEPS).nonzero().flatten().tolist():
                names = ", ".join(map(str, unused[:8])) + (", …" if len(unused) > 8 else "")
                self.warn(
                    f"step {step}: {len(unused)} of {len(row)} experts of layer {layer} have received no token for "
                    f"{_IDLE_STEPS} steps ({names}); a higher model.router_aux_loss_coef spreads tokens more evenly"
                )
