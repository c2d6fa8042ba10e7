"""Which parameter is updated how: AdamW or Muon, decayed or not, at which learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtitan_style.common.extensions import OPTIMIZERS
from torchtitan_style.config.schema import LRScheduler, Optimizer
from torchtitan_style.models.spec import ModelSpec

from .adamw import adamw, step_if
from .custom import CustomOptimizer
from .muon import Muon
from .schedule import lr_factor

_RATES_AT_ONCE = 1024
"""Learning rates that are computed together. How many updates are taken of as many steps, the device decides."""


class Optimizers:
    """The optimizers of a model, as one. Made by all ranks together.

    total_steps: of the run, for the schedules. dtype: what the model computes in, which Muon takes for its
    matrix multiplications. spec: of the model, which knows which parameters Muon takes. head_dim: the model's, for
    optimizer.muon.per_head. group: the ranks that hold the model, or this stage of it; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Optimizer,
        scheduler: LRScheduler,
        *,
        total_steps: int,
        dtype: torch.dtype,
        spec: ModelSpec,
        head_dim: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.total_steps = total_steps
        self.adamw: torch.optim.AdamW | None = None
        self.muon: Muon | None = None
        self.custom: CustomOptimizer | None = None
        self.peaks, self.schedulers = {"lr": config.adamw_lr}, {"lr": scheduler}
        if OPTIMIZERS.added(config.name):
            self.custom = CustomOptimizer(OPTIMIZERS.get(config.name)(named, config), list(named.values()))
        else:
            hidden = {n: p for n, p in named.items() if config.name == "muon" and spec.is_hidden_matrix(n, p)}
            self.adamw = adamw({n: p for n, p in named.items() if n not in hidden}, config)
            if hidden:
                self.muon = Muon(
                    list(hidden.values()),
                    config.muon,
                    lr=config.muon_lr,
                    weight_decay=config.muon_weight_decay,
                    dtype=dtype,
                    block_rows=[
                        head_dim
                        if config.muon.per_head and spec.has_heads(name)
                        else spec.stacked_rows(name, tuple(p.shape))
                        for name, p in hidden.items()
                    ],
                    group=group,
                )
            if config.name == "muon":  # also where this rank's stage of a pipeline trains no matrices
                self.peaks["lr_muon"], self.schedulers["lr_muon"] = config.muon_lr, config.muon.schedule(scheduler)
        device = next(iter(model.parameters())).device
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        """Taken so far: on the device, which decides of each whether it is taken."""
        self._rates: dict[str, Tensor] = {}
        """Learning rates of the next updates, from ``_first_rate`` on."""
        self._first_rate = self._rates_left = 0

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]:
        """Of each parameter, tensors by name."""
        return {tensor: state for part in self._parts() for tensor, state in part.state.items()}

    def _parts(self) -> list[Any]:
        return [part for part in (self.adamw, self.muon, self.custom) if part is not None]

    def zero_grad(self) -> None:
        for part in self._parts():
            part.zero_grad()

    def learning_rates(self, update: int) -> dict[str, float]:
        """Those of an update (from 1), by the name they have in the metrics."""
        return {
            name: peak * lr_factor(update, self.schedulers[name], total_steps=self.total_steps)
            for name, peak in self.peaks.items()
        }

    def step_if(self, sound: Tensor) -> None:
        """Update all weights; or none, and no state, unless ``sound``: a 0-dim bool on the device, the same on all
        ranks. The schedules go on with each update, so a step that is left out does not count for them."""
        if not self._rates_left:
            self._look_up_rates()
        self._rates_left -= 1
        rates = {name: torch.take(table, self.updates - self._first_rate) for name, table in self._rates.items()}
        if self.adamw:
            for group in self.adamw.param_groups:
                group["lr"] = rates["lr"]
            step_if(self.adamw, sound)
        if self.muon:
            self.muon.param_groups[0]["lr"] = rates["lr_muon"]
            self.muon.step_if(sound)
        if self.custom:
            self.custom.step_if(sound, rates["lr"])
        self.updates += sound

    def _look_up_rates(self) -> None:
        """Put the rates of the next updates on the device. Waits for it, once in ``_RATES_AT_ONCE`` steps."""
        self._first_rate, self._rates_left = int(self.updates), _RATES_AT_ONCE
        rates = [self.learning_rates(self._first_rate + n) for n in range(1, _RATES_AT_ONCE + 1)]
        self._rates = {name: torch.tensor([r[name] for r in rates], device=self.updates.device) for name in self.peaks}

    def forget(self) -> None:
        """Begin anew: no moments, no momenta."""
        for state in self.state.values():
            for tensor in state.values():
                tensor.zero_()

    def start_after(self, updates: int) -> None:
        """Go on as after so many updates."""
        self.updates.fill_(updates)
        self._rates_left = 0
