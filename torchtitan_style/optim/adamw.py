"""AdamW with two groups of parameters, decayed and not."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from torchtitan_style.config.schema import Optimizer


def adamw(parameters: Mapping[str, Tensor], config: Optimizer) -> torch.optim.AdamW:
    """AdamW over ``parameters``, by name (Loshchilov & Hutter 2019), one fused kernel per group.

    Its state is made here and not at the first step, so that a checkpoint can be read into it.
    """
    decayed = {n: p for n, p in parameters.items() if is_decayed(n, p, config)}
    others = {n: p for n, p in parameters.items() if n not in decayed}
    optimizer = torch.optim.AdamW(
        [
            {"params": list(decayed.values()), "weight_decay": config.weight_decay},
            {"params": list(others.values()), "weight_decay": 0.0},
        ],
        lr=config.adamw_lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def is_decayed(name: str, parameter: Tensor, config: Optimizer) -> bool:
    """Matrices are, norm weights and biases are not, nor what ``optimizer.no_decay`` names."""
    return parameter.ndim >= 2 and not any(fnmatchcase(name, pattern) for pattern in config.no_decay)


def step_if(optimizer: torch.optim.AdamW, sound: Tensor) -> None:
    """Update the weights, or leave them and the optimizer's state as they are unless ``sound``, a 0-dim bool.

    The decision is taken on the device, without waiting for it: the fused kernel has a flag for it,
    made for loss scaling.
    """
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = (~sound).float()  # type: ignore[attr-defined]
    optimizer.step()
