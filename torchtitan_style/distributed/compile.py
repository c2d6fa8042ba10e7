"""torch.compile, per block or for the whole model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from torchtitan_style.config.schema import Compile

__all__ = ["apply_compile"]


def apply_compile(model: nn.Module, layers: Iterable[nn.Module], config: Compile, *, device_type: str) -> None:
    """Compile ``layers`` (one graph serves all, as they differ in their weights only) or ``model``, in place.

    As with recomputation the forward method is wrapped: FSDP's hooks stay outside the graph.
    """
    if not config.enable:
        return
    if device_type == "cpu":
        from torch._inductor import config as inductor_config  # takes long to import

        from torchtitan_style.cpu.operands import OperandsInRows

        inductor_config.post_grad_custom_post_pass = OperandsInRows()
    for module in [model] if config.scope == "model" else layers:
        # One graph for each shape: with sizes left open torch 2.13 compiles attention's gradient wrongly if the number
        # of heads is one of them, as after a second model in one process.
        module.forward = torch.compile(module.forward, dynamic=False)
