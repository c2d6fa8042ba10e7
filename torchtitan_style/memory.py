"""How much memory a run needs, by arithmetic, and how much there is. Needs no torch."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .config import Config
from .config.layout import Layout, plan_batch
from .models.qwen3.hf import parameter_shapes

__all__ = ["MemoryPlan", "Room", "gpu_memory", "host_memory", "plan_memory"]

_FP32 = 4


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank."""

    weights: int
    """fp32 master weights."""
    gradients: int
    """Of the weights, in fp32."""
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
    for name, shape in parameter_shapes(config.model.qwen3()).items():
        # Tensor parallelism splits matrices; norms are on each of its ranks. FSDP splits all.
        ranks = layout.dp_shard * (layout.tp if len(shape) == 2 else 1)
        size = _FP32 * math.ceil(math.prod(shape) / ranks)
        weights += size
        muon = config.optimizer.name == "muon" and len(shape) == 2 and ".layers." in name
        optimizer += size * (1 if muon else 2)
    return MemoryPlan(
        weights=weights,
        gradients=weights,
        optimizer=optimizer,
        copies=_copies(config, layout),
        activations=_activations(config, layout),
    )


def _copies(config: Config, layout: Layout) -> int:
    number_bytes = _number_bytes(config)
    if layout.dp_shard == 1 and number_bytes == _FP32:
        return 0  # the weights themselves
    blocks: dict[str, int] = {}
    outside = 0
    for name, shape in parameter_shapes(config.model.qwen3()).items():
        numbers = math.prod(shape)
        if ".layers." in name:
            block = name.split(".")[2]
            blocks[block] = blocks.get(block, 0) + numbers
        else:
            outside += numbers
    whole = layout.world_size == 1 and config.activation_checkpoint.mode in ("none", "memory_budget")
    whole |= config.compile.enable and config.compile.scope == "model"
    whole |= config.parallelism.fsdp_reshard_after_forward == "never"
    gathered = sum(blocks.values()) if whole else max(blocks.values())
    return number_bytes * (outside + gathered) // layout.tp


def _activations(config: Config, layout: Layout) -> int:
    """Inputs of blocks, and the outputs of matrix multiplications in those that are not recomputed."""
    shape, recompute = config.model.qwen3(), config.activation_checkpoint
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


@dataclass(frozen=True)
class Room:
    """Bytes of memory: in all, and not in use now."""

    total: int
    free: int


def host_memory() -> Room | None:
    """The machine's memory, or what this process's control group may use of it. None if it cannot be found out."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in ("MemTotal", "MemAvailable"):
                found[name] = int(value.split()[0]) * 1024
    totals, frees = [found.get("MemTotal")], [found.get("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        totals.append(limit)
        frees.append(limit - int((group / "memory.current").read_text()))
    total, free = (min((n for n in numbers if n is not None), default=None) for numbers in (totals, frees))
    return None if total is None or free is None else Room(total, free)


def gpu_memory() -> Room | None:
    """Memory of the smallest GPU that this process can use, by nvidia-smi. None if it cannot be found out."""
    command = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    if visible:
        command.append(f"--id={','.join(visible)}")
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        rooms = [Room(*(int(number) * 2**20 for number in line.split(","))) for line in listed.splitlines()]
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return None  # no nvidia-smi, or "[N/A]" on devices that share the host's memory
    return Room(min(r.total for r in rooms), min(r.free for r in rooms)) if rooms else None
