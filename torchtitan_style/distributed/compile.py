"""torch.compile, per block or for the whole model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from torchtitan_style.config.schema import Compile

__all__ = ["apply_compile"]


def apply_compile(model: nn.Module, layers: Iterable[nn.Module], config: Compile) -> None:
    """Compile ``layers`` (one graph serves all, as they differ in their weights only) or ``model``, in place.

    As with recomputation the forward method is wrapped: FSDP's hooks stay outside the graph.
    """
    if not config.enable:
        return
    for module in [model] if config.scope == "model" else layers:
        module.forward = torch.compile(module.forward)
