"""How much memory a run needs, by arithmetic. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchtitan_style.config import Config
from torchtitan_style.config.layout import Layout, plan_batch
from torchtitan_style.models.registry import model_config, spec_of

__all__ = ["MemoryPlan", "checkpoint_bytes", "plan_memory"]

_FP32 = 4


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank."""

    weights: int
    """fp32 master weights."""
    gradients: int
    """Of the weights, in fp32: sharded, or whole while a step's microbatches accumulate."""
    optimizer: int
    """AdamW's two moments, or Muon's one."""
    copies: int
    """Weights in the type of computation: all of them on one process, those gathered at once with FSDP."""
    activations: int
    """What is kept for the backward pass, at least."""

    @property
    def state(self) -> int:
        """What is there in every step, whatever the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.state + self.copies + self.activations


def plan_memory(config: Config, layout: Layout) -> MemoryPlan:
    """Bytes that a rank of ``layout`` needs at least. Kernels' workspaces and fragmentation come on top."""
    weights = optimizer = 0
    for name, shape in _shapes(config).items():
        # Tensor parallelism splits matrices; norms are on each of its ranks. FSDP splits all.
        ranks = layout.fsdp * (layout.tp if len(shape) == 2 else 1)
        size = _FP32 * math.ceil(math.prod(shape) / ranks)
        weights += size
        muon = config.optimizer.name == "muon" and len(shape) == 2 and ".layers." in name
        optimizer += size * (1 if muon else 2)
    return MemoryPlan(
        weights=weights,
        gradients=_gradients(config, layout, sharded=weights),
        optimizer=optimizer,
        copies=_copies(config, layout),
        activations=_activations(config, layout),
    )


def _gradients(config: Config, layout: Layout, *, sharded: int) -> int:
    """FSDP keeps whole gradients beside the shards until it may reduce them."""
    accumulates = plan_batch(config.training, layout.dp).accumulation_steps > 1
    if layout.fsdp == 1 or not accumulates or config.parallelism.fsdp_reduce_gradients == "each_microbatch":
        return sharded
    return sharded * (layout.fsdp + 1)


def _copies(config: Config, layout: Layout) -> int:
    number_bytes = _number_bytes(config)
    if layout.fsdp == 1 and number_bytes == _FP32:
        return 0  # the weights themselves
    blocks: dict[str, int] = {}
    outside = 0
    for name, shape in _shapes(config).items():
        numbers = math.prod(shape)
        if ".layers." in name:
            block = name.split(".")[2]
            blocks[block] = blocks.get(block, 0) + numbers
        else:
            outside += numbers
    whole = layout.world_size == 1 and config.activation_checkpoint.mode in ("none", "memory_budget")
    whole |= config.parallelism.fsdp_reshard_after_forward == "never"
    gathered = sum(blocks.values()) if whole else max(blocks.values())
    return number_bytes * (outside + gathered) // layout.tp


def _activations(config: Config, layout: Layout) -> int:
    """Inputs of blocks, and the outputs of matrix multiplications in those that are not recomputed."""
    shape, recompute = model_config(config.model), config.activation_checkpoint
    heads = 2 * shape.num_attention_heads + 2 * shape.num_key_value_heads  # q, k, v and attention's output
    inside = heads * shape.head_dim + 2 * shape.intermediate_size
    if recompute.mode == "full":
        share = 0.0
    elif recompute.mode == "memory_budget":
        share = recompute.memory_budget
    elif recompute.mode == "selective" and recompute.selective_ac_option != "op":
        share = 1 - 1 / int(recompute.selective_ac_option)
    else:
        share = 1.0
    tokens = plan_batch(config.training, layout.dp).local_batch_size * config.training.seq_len
    numbers = tokens * shape.num_hidden_layers * (shape.hidden_size + share * inside)
    return int(numbers * _number_bytes(config) / layout.tp)


def _number_bytes(config: Config) -> int:
    return _FP32 if config.training.mixed_precision_param == "float32" else 2


def checkpoint_bytes(config: Config) -> int:
    """Weights and optimizer state, in fp32; what else is in a checkpoint does not count beside them."""
    whole = plan_memory(config, Layout())
    return whole.weights + whole.optimizer


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    return spec_of(config.model.name).parameter_shapes(model_config(config.model))
