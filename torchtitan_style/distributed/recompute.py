"""Activation checkpointing: recompute a block's activations in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchtitan_style.config.schema import ActivationCheckpoint

_aten = torch.ops.aten
_SAVED = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.higher_order.inductor_compiled_code,  # FlexAttention in a block that is not compiled as a whole
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}
"""Operations whose outputs "selective" keeps: dear to compute for the memory they take. Under
tensor parallelism the reduced sums too, as recomputing them would communicate again."""


def keep_outputs_of(*operations: Any) -> None:
    """Have "selective" keep the outputs of these, too."""
    _SAVED.update(operations)


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE


_CPU_MEMORY_BUDGET = 0.8
"""Share of the activations that compiled blocks keep on CPU in any case: the rest takes less time to recompute than
to write and read (measured: docs/performance.md)."""


def set_memory_budget(config: ActivationCheckpoint, *, device_type: str, collectives: bool) -> None:
    """Tell the compiler how much of the activations to keep, in all graphs that it makes from now on. collectives:
    whether there are any in the graphs."""
    budget = 1.0
    if config.mode == "memory_budget":
        budget = config.memory_budget
    elif config.mode == "none" and device_type == "cpu" and not collectives:  # torch cannot weigh those
        budget = _CPU_MEMORY_BUDGET
    functorch_config.activation_memory_budget = budget


def recomputes_operations(config: ActivationCheckpoint) -> bool:
    """Whether ``config`` recomputes single operations rather than whole blocks."""
    return config.mode == "selective" and config.selective_ac_option == "op"


def apply_activation_checkpoint(layers: Iterable[nn.Module], config: ActivationCheckpoint) -> None:
    """Make ``layers`` recompute their activations, as ``config`` says, in place.

    The forward method is wrapped, not the module: parameter names stay, and hooks that FSDP puts on
    the module later run outside the recomputed part.
    """
    if config.mode in ("none", "memory_budget"):
        return
    every = 1
    keep: dict[str, Any] = {}
    if recomputes_operations(config):
        keep = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
        # The compiler warns that in-place operations in the block would go wrong; there are none.
        logging.getLogger("torch._higher_order_ops.wrap").addFilter(
            lambda record: "context_fn" not in record.getMessage()
        )
    elif config.mode == "selective":
        every = int(config.selective_ac_option)
    for layer in list(layers)[::every]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, **keep)
