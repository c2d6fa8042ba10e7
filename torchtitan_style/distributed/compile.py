"""torch.compile, block by block."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from torchtitan_style.config.schema import Compile


def apply_compile(layers: Iterable[nn.Module], config: Compile, *, device_type: str) -> None:
    """Compile ``layers``, in place. One graph serves all, as they differ in their weights only.

    As with recomputation the forward method is wrapped: FSDP's hooks stay outside the graph.
    """
    if not config.enable:
        return
    if device_type == "cpu":
        from torch._inductor import config as inductor_config  # takes long to import

        from torchtitan_style.cpu.operands import OperandsInRows

        inductor_config.post_grad_custom_post_pass = OperandsInRows()
    for module in layers:
        # One graph for each shape: with sizes left open torch 2.13 compiles attention's gradient wrongly if the number
        # of heads is one of them, as after a second model in one process.
        module.forward = torch.compile(module.forward, dynamic=False)
