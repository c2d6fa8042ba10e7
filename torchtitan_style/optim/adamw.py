"""AdamW with two groups of parameters: matrices are decayed, norm weights and biases are not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchtitan_style.config.schema import Optimizer

__all__ = ["build_optimizer", "step_if_finite"]


def build_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW over ``model``'s parameters (Loshchilov & Hutter 2019), one fused kernel per group.

    Its state is made here and not at the first step, so that a checkpoint can be read into it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def step_if_finite(optimizer: torch.optim.AdamW, grad_norm: Tensor) -> None:
    """Update the weights, or leave them and the optimizer's state as they are if ``grad_norm`` is not finite.

    The decision is taken on the device, without waiting for it: the fused kernel has a flag for it,
    made for loss scaling. ``grad_norm`` is global, so all ranks decide alike.
    """
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = (~torch.isfinite(grad_norm)).float()  # type: ignore[attr-defined]
    optimizer.step()
