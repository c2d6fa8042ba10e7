"""Every layout of N ranks, with what else decides whether it fits and how long it takes. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from torchtitan_style.config import Config
from torchtitan_style.config.layout import Layout, plan_batch, plan_layout, plan_streams, reshards_after_forward
from torchtitan_style.models.registry import model_config, spec_of

from .activations import is_recomputed
from .devices import Assumptions, Device
from .parameters import Kind, parameter_kinds
from .plan import Plan, make_plan

_RECOMPUTE = (("none", "op"), ("selective", "op"), ("selective", "2"), ("full", "op"))
_LOCAL_BATCHES = 12
"""Sizes tried, the smallest first."""


@dataclass(frozen=True)
class Found:
    """What a search has found."""

    best: list[Plan]
    """That fit, the fastest first; of each layout the fastest only."""
    tried: int
    fitting: int
    smallest: Plan | None
    """The one that needs least memory; None if no layout divides the ranks."""


def global_batch(config: Config, world_size: int) -> int:
    """Rows of a step, which a search keeps: what is configured, or what the configured layout makes of it."""
    training = config.training
    if training.global_batch_size != -1:
        return training.global_batch_size
    try:
        dp = plan_layout(config.parallelism, world_size).dp
    except ValueError:
        dp = world_size
    return plan_batch(training, dp).global_batch_size


def search(
    config: Config,
    world_size: int,
    device: Device,
    assumptions: Assumptions,
    *,
    rows: int | None = None,
    most: int = 5,
    only_memory: bool = False,
) -> Found:
    """Plans for all layouts of ``world_size`` ranks, recomputation modes and local batch sizes.

    rows: of a step; None: as configured. only_memory: stop at the first that fits.
    """
    fastest: dict[Layout, Plan] = {}
    tried = fitting = 0
    smallest: Plan | None = None
    for plan in _plans(config, world_size, rows or global_batch(config, world_size), device, assumptions):
        tried += 1
        if smallest is None or plan.memory.total < smallest.memory.total:
            smallest = plan
        if not plan.fits:
            continue
        fitting += 1
        known = fastest.get(plan.work.layout)
        if known is None or plan.time.step_seconds < known.time.step_seconds:
            fastest[plan.work.layout] = plan
        if only_memory:
            break
    best = sorted(fastest.values(), key=lambda plan: plan.time.step_seconds)
    return Found(best[:most], tried, fitting, smallest)


def nearest_that_fits(config: Config, layout: Layout, device: Device, assumptions: Assumptions) -> Plan | None:
    """A plan for as many ranks that fits and changes least of ``config``; of several the fastest."""
    rows = plan_batch(config.training, layout.dp).global_batch_size
    own = _choices(make_plan(config, layout, device, assumptions))

    def distance(plan: Plan) -> tuple[int, float]:
        changed = sum(own[key] != value for key, value in _choices(plan).items())
        return changed, plan.time.step_seconds

    fitting = (plan for plan in _plans(config, layout.world_size, rows, device, assumptions) if plan.fits)
    return min(fitting, key=distance, default=None)


def least_ranks(config: Config, device: Device, assumptions: Assumptions, *, most: int = 4096) -> int | None:
    """The least number of ranks with a layout that fits, of powers of two within a host and whole hosts then; None
    if even ``most`` do not."""
    rows = global_batch(config, 1)
    number = 1
    while number <= most:
        if search(config, number, device, assumptions, rows=rows, only_memory=True).best:
            return number
        number = number * 2 if number < 4 * device.per_host else number + max(device.per_host, number // 4)
    return None


def _plans(config: Config, world_size: int, rows: int, device: Device, assumptions: Assumptions) -> Iterator[Plan]:
    """All of them, but for batches larger than the first that does not fit."""
    kinds = parameter_kinds(config)
    for candidate, layout in _families(config, world_size):
        for local in _local_batches(rows, layout.dp):
            plan = _plan(candidate, layout, rows, local, device, assumptions, kinds)
            if plan is None:
                break
            yield plan
            if not plan.fits:
                break


def _families(config: Config, world_size: int) -> Iterator[tuple[Config, Layout]]:
    """Configurations for each layout but for the batch, those that compute least first."""
    for layout in _layouts(config, world_size):
        parallelism = config.parallelism.model_copy(
            update={
                "data_parallel_replicate_degree": layout.dp_replicate,
                "data_parallel_shard_degree": -1,
                "tensor_parallel_degree": layout.tp,
                "expert_parallel_degree": layout.ep,
            }
        )
        budgets = [("memory_budget", "op")] if config.compile.enable and layout.tp == layout.cp == 1 else []
        for mode, option in (*_RECOMPUTE, *budgets):
            recompute = config.activation_checkpoint.model_copy(update={"mode": mode, "selective_ac_option": option})
            for reshard in ("never", "always") if layout.fsdp > 1 else ("always",):
                yield (
                    config.model_copy(
                        update={
                            "parallelism": parallelism.model_copy(update={"fsdp_reshard_after_forward": reshard}),
                            "activation_checkpoint": recompute,
                        }
                    ),
                    layout,
                )


def _layouts(config: Config, world_size: int) -> Iterator[Layout]:
    model, spec = model_config(config.model), spec_of(config.model.name)
    # As they are: a search changes neither the pipeline nor the parts of a row.
    pp, cp = config.parallelism.pipeline_parallel_degree, config.parallelism.context_parallel_degree
    world_size //= pp * cp
    for tp in _divisors(world_size):
        if config.training.seq_len % (tp if cp == 1 else 2 * cp * tp) or any(
            getattr(model, each.field) % tp for each in spec.tensor_parallel
        ):
            continue
        for replicate in _divisors(world_size // tp):
            shard = world_size // tp // replicate
            for ep in _divisors(shard * cp) if spec.expert_parallel else [1]:
                if not any(getattr(model, each.field) % ep for each in spec.expert_parallel):
                    yield Layout(pp=pp, dp_replicate=replicate, dp_shard=shard, cp=cp, tp=tp, ep=ep)


def _local_batches(rows: int, dp: int) -> list[int]:
    return [] if rows % dp else _divisors(rows // dp)[:_LOCAL_BATCHES]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _plan(
    config: Config,
    layout: Layout,
    rows: int,
    local: int,
    device: Device,
    assumptions: Assumptions,
    kinds: tuple[Kind, ...],
) -> Plan | None:
    if config.data.streaming:
        try:
            plan_streams(config.data, rows, layout.dp)
        except ValueError:
            return None
    training = config.training.model_copy(update={"local_batch_size": local, "global_batch_size": rows})
    return make_plan(config.model_copy(update={"training": training}), layout, device, assumptions, kinds=kinds)


def _choices(plan: Plan) -> dict[str, object]:
    """What a search chooses, by key."""
    config, layout = plan.work.config, plan.work.layout
    recompute = config.activation_checkpoint
    selective = recompute.mode == "selective"
    return {
        "parallelism.data_parallel_replicate_degree": layout.dp_replicate,
        "parallelism.data_parallel_shard_degree": layout.dp_shard,
        "parallelism.context_parallel_degree": layout.cp if layout.cp > 1 else None,
        "parallelism.tensor_parallel_degree": layout.tp,
        "parallelism.expert_parallel_degree": layout.ep if plan.work.sparse_layers else None,
        "parallelism.fsdp_reshard_after_forward": "always" if reshards_after_forward(config.parallelism) else "never",
        "activation_checkpoint.mode": recompute.mode,
        "activation_checkpoint.selective_ac_option": recompute.selective_ac_option if selective else None,
        "training.local_batch_size": plan.work.batch.local_batch_size,
        "training.global_batch_size": plan.work.batch.global_batch_size,
    }


def overrides_of(plan: Plan) -> str:
    """The plan's choices as arguments of the command line."""
    return " ".join(f"--{key} {value}" for key, value in _choices(plan).items() if value is not None)


def why(plan: Plan) -> str:
    """What makes it as fast as it is, and what it pays."""
    layout, config, time = plan.work.layout, plan.work.config, plan.time
    recompute = config.activation_checkpoint
    parts = []
    blocks = range(plan.work.layers)
    if blocks and all(is_recomputed(plan.work, place) for place in blocks):
        parts.append("recomputes every block")
    elif recompute.mode == "none":
        parts.append("recomputes nothing")
    elif recompute.mode == "selective" and recompute.selective_ac_option == "op":
        parts.append("recomputes all but matrix products")
    elif recompute.mode == "selective":
        parts.append(f"recomputes one block in {recompute.selective_ac_option}")
    else:
        parts.append(f"the compiler keeps {recompute.memory_budget:.0%} of the activations")
    per_host = plan.device.per_host
    if layout.tp > 1:
        parts.append(f"tp {'within a host' if layout.tp <= per_host else 'across hosts'}")
    if layout.ep > 1:
        parts.append(f"ep {'within a host' if layout.ep * layout.tp <= per_host else 'across hosts'}")
    if layout.fsdp > 1:
        wide = layout.fsdp * layout.tp > per_host
        parts.append(f"shards over {layout.fsdp} ranks{' across hosts' if wide else ''}")
    if layout.fsdp > 1 and plan.work.keeps_gathered:
        parts.append("gathers each block once a microbatch")
    if layout.world_size > 1:
        parts.append(f"{time.hidden_share:.0%} of the communication is hidden")
    if plan.work.batch.accumulation_steps > 1:
        which = "each" if plan.work.stages else "each but the first"
        counted = f", {which} routed once more beforehand" if plan.work.counting_passes else ""
        parts.append(f"{plan.work.batch.accumulation_steps} microbatches{counted}")
    slowest = max(time.phases, key=lambda phase: phase.times * phase.seconds)
    parts.append(f"{slowest.name} takes most time, bound by {slowest.bound}")
    return "; ".join(parts)


def shortfall(plan: Plan) -> str:
    """What a plan that does not fit lacks most, and what would help."""
    kind = max(plan.memory.peak, key=lambda name: plan.memory.peak[name])
    remedies = {
        "weights": "more ranks, or a smaller model",
        "gradients": 'parallelism.fsdp_reduce_gradients = "each_microbatch", more tensor parallelism, or more ranks',
        "optimizer": 'more ranks, or optimizer.name = "muon", which keeps one moment instead of two',
        "copies": "more tensor parallelism, or a model with smaller blocks",
        "activations": "shorter rows (training.seq_len), or more tensor or context parallelism",
        "logits": "more tensor parallelism, or a smaller vocabulary",
        "buffers": "more tensor parallelism",
        "slack": "a device with more memory",
    }
    missing = plan.memory.total - plan.device.memory
    return f"{missing / 2**30:,.1f} GiB are missing; the largest part is {kind}: try {remedies[kind]}"


def as_dict(plan: Plan) -> dict[str, object]:
    """A plan in short, for JSON."""
    return {
        "layout": dataclasses.asdict(plan.work.layout),
        "overrides": overrides_of(plan),
        "step_seconds": plan.time.step_seconds,
        "tokens_per_second": plan.time.tokens_per_second,
        "mfu": plan.time.mfu,
        "memory_bytes": plan.memory.total,
        "why": why(plan),
    }
