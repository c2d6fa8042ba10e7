"""How much memory a rank needs, by kind and by moment of the step. Needs no torch."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from torchtitan_style.common.sizes import FP32, LOGITS_PER_CHUNK, MIN_TOKENS_PER_CHUNK, logits_rows
from torchtitan_style.config import Config
from torchtitan_style.config.layout import Layout, reduces_each_microbatch

from .activations import block_inside, kept_by_layers, kept_outside, last_block
from .devices import Assumptions
from .parameters import State, parameter_kinds, saved_of
from .workload import Workload

KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "copies": "weights to compute with",
    "activations": "activations",
    "logits": "logits and loss",
    "buffers": "communication and workspace",
    "slack": "allocator and libraries",
}
"""Each kind of memory, and what to call it."""

_OWNED = 2**24
"""Numbers of a round that a rank makes orthogonal at once for Muon, unless one matrix is more."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the rank that needs most."""

    state: State
    moments: dict[str, dict[str, int]]
    """Moment of the step → kind of memory → bytes."""
    host_copy: int
    """What asynchronous checkpoints copy to the host's memory, beside all this."""
    on_gpu: bool

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> dict[str, int]:
        """By kind, at the moment when it is most."""
        return self.moments[self.peak_moment]

    @property
    def total(self) -> int:
        """At the peak; on CPU with the host copy, which is in the same memory."""
        return sum(self.peak.values()) + (0 if self.on_gpu else self.host_copy)


def plan_memory(config: Config, layout: Layout, *, on_gpu: bool = True) -> MemoryPlan:
    """Bytes that a rank of ``layout`` needs. Raises ValueError if the batch cannot be shared out over it."""
    ranks = Workload.of_ranks(config, layout, on_gpu=on_gpu)
    return max((memory_of(work, Assumptions()) for work in ranks), key=lambda plan: plan.total)


def checkpoint_bytes(config: Config) -> int:
    """Weights and optimizer state, of LoRA the adapters' alone, in fp32; the rest of a checkpoint is small."""
    return saved_of(parameter_kinds(config), Layout())


def reference_bytes(parameters: int, layout: Layout) -> tuple[int, int]:
    """What ``verify`` needs for a model of so many parameters: all ranks together, and one process alone.

    Four fp32 numbers per parameter and replica (weight, gradient, two moments), on every rank the gathered weights
    and gradients, and the result that they are compared with.
    """
    shared_out = 4 * FP32 * layout.dp_replicate + 2 * FP32 * layout.world_size / layout.tp
    return int(parameters * (shared_out + FP32)), parameters * 4 * FP32


def memory_of(work: Workload, assumptions: Assumptions) -> MemoryPlan:
    """The memory of ``work`` at each moment of its step."""
    loss = _loss(work) if work.has_head else 0
    kept, outside = kept_by_layers(work), kept_outside(work)
    inside = block_inside(work)
    kept = int(kept * work.passes_in_flight)
    passed_on = _passed_on(work)
    gathered, block = _gathered(work)
    hidden = work.tokens * work.c * work.hidden
    accumulated = _accumulated(work)
    head = work.vocabulary * work.hidden * work.trains_head
    head_gradient = 0 if accumulated > work.state.gradients else head * (work.c if work.is_sharded else FP32)
    after_head, outer, reduction = gathered, work.trained_outer_numbers, _reduction(work)
    if work.own_groups and work.is_sharded and not work.stages:  # the head is done with before the blocks
        after_head -= work.vocabulary * work.hidden * work.c
        head_gradient = 0 if accumulated else head * FP32 // work.layout.fsdp
        outer -= head
        reduction = max(reduction, head * work.r)
    moments = {
        "at the loss": {
            "gradients": accumulated,
            "copies": gathered + (0 if work.keeps_gathered else block),
            "activations": kept + outside + hidden,
            "logits": loss,
        },
        "backward, the head": {
            "gradients": accumulated,
            "copies": gathered,
            "activations": kept + outside,
            "logits": (2 * hidden + 2 * head * (FP32 + work.c)) * work.has_head,
        },
        "backward, the last block": {
            "gradients": accumulated + head_gradient,
            "copies": after_head + _in_flight(work, block),
            "activations": kept + outside + inside,
            "buffers": reduction,
        },
        "backward, the first block": {
            "gradients": max(accumulated, work.state.gradients + (outer * work.c if work.is_sharded else 0)),
            "copies": after_head + _in_flight(work, block),
            "activations": last_block(work),
            "buffers": _reduction(work),
        },
        "optimizer step": {"gradients": work.state.gradients, "buffers": _muon_rounds(work)},
    }
    for moment in ("backward, the last block", "backward, the first block"):
        moments[moment]["buffers"] += _exchanged(work)
    for parts in moments.values():
        parts["buffers"] = parts.get("buffers", 0) + passed_on
    return MemoryPlan(
        state=work.state,
        moments={name: _completed(work, parts, assumptions) for name, parts in moments.items()},
        host_copy=_host_copy(work),
        on_gpu=work.on_gpu,
    )


def _completed(work: Workload, parts: dict[str, int], assumptions: Assumptions) -> dict[str, int]:
    """``parts`` with what is there all the time, and the allocator's share."""
    changing = sum(parts.values())
    fixed = assumptions.library_bytes(on_gpu=work.on_gpu, experts=work.sparse_layers > 0)
    if work.on_gpu and work.layout.world_size > 1:
        layout = work.layout
        axes = (layout.fsdp, layout.dp_replicate, layout.cp, layout.tp, layout.pp, layout.ep)
        fixed += int(assumptions.nccl_bytes * (1 + sum(size > 1 for size in axes)))
    on_cpu = assumptions.fsdp_slack_cpu if work.is_sharded else assumptions.allocator_slack_cpu
    slack = assumptions.allocator_slack if work.on_gpu else on_cpu
    every = {"weights": work.state.weights, "optimizer": work.state.optimizer, "slack": fixed + int(changing * slack)}
    return {kind: int(parts.get(kind, 0) + every.get(kind, 0)) for kind in KINDS}


def _gathered(work: Workload) -> tuple[int, int]:
    """Weights in the type of computation that stay for the whole pass, and those of a block that come and go."""
    if not work.is_sharded:  # copies of all, if the type is another
        return work.copied_numbers * work.c, 0
    block = work.block_numbers * work.c
    if work.keeps_gathered:
        return (work.outer_numbers + work.blocks_numbers) * work.c, 0
    return (work.outer_numbers - work.embedding_numbers) * work.c, block


def _passed_on(work: Workload) -> int:
    """What comes from other stages: torch has a buffer for each microbatch, that stays."""
    arriving = work.sent_forward + work.sent_backward  # gradients come where outputs went
    return int(arriving * work.batch.accumulation_steps * work.scattered_tokens * work.c * work.hidden)


def _exchanged(work: Workload) -> int:
    """Rows on their way to experts of other ranks: those that are sent, and those that arrive."""
    return int(2 * work.rows * work.c * work.hidden) if work.layout.ep > 1 and work.sparse_layers else 0


def _in_flight(work: Workload, block: int) -> int:
    """Blocks that are gathered at once: the one computed with and the one that is fetched before it is needed."""
    return 2 * block


def _accumulated(work: Workload) -> int:
    """Gradients that earlier microbatches have left. FSDP2 keeps them whole until they are summed over the ranks."""
    if work.batch.accumulation_steps == 1:
        return 0
    if reduces_each_microbatch(work.config.parallelism, work.layout):
        return work.state.gradients
    trained = work.trained_blocks_numbers + work.trained_outer_numbers
    return trained * work.r if work.is_sharded else work.state.gradients


def _reduction(work: Workload) -> int:
    """A block's gradients, as they come and in the type that they are summed in, and another all-gather's output."""
    if not work.is_sharded:
        return work.trained_block_numbers * work.c if work.c < FP32 else 0
    trained = work.trained_block_numbers
    gathering = 0 if work.keeps_gathered else work.block_numbers * work.c
    return trained * (work.c + work.r) + gathering + 2 * trained * FP32 // work.layout.fsdp


def _loss(work: Workload) -> int:
    """Logits of a chunk, and gradients of hidden states and head; see distributed/loss.py."""
    rows = logits_rows(
        work.tokens,
        work.vocabulary,
        most_logits=LOGITS_PER_CHUNK,
        least_rows=MIN_TOKENS_PER_CHUNK["cuda" if work.on_gpu else "cpu"],
    )
    logits = rows * work.vocabulary
    held = work.c + (FP32 if work.c < FP32 else 0) + (work.c if work.compiled else 0)
    head = work.vocabulary * work.hidden * work.trains_head
    return logits * held + head * (work.c + FP32) + work.tokens * work.hidden * work.c


def _muon_rounds(work: Workload) -> int:
    """What a rank makes orthogonal at once: gathered, whole, its powers, the result, and what is sent."""
    sizes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for kind in work.kinds:
        if not kind.muon:
            continue
        if kind.is_exchanged(work.layout):
            sizes[()] += [math.prod(kind.shape)] * kind.count
        else:  # a rank takes its parts of one shape together
            width = kind.shape[-1]
            shape = (math.prod(kind.shape) // kind.matrices // width, width)
            sizes[shape] += [math.prod(kind.local(work.layout))] * kind.count
    at_once = (min(sum(alike), max(_OWNED, *alike)) for alike in sizes.values())
    return 6 * work.c * max(at_once, default=0)


def _host_copy(work: Workload) -> int:
    checkpoint = work.config.checkpoint
    if not checkpoint.enable or checkpoint.async_mode == "disabled":
        return 0
    return saved_of(work.kinds, work.layout)
