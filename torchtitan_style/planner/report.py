"""A plan in words, and as JSON. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torchtitan_style.common.files import readable_bytes
from torchtitan_style.config.layout import Layout

from .memory import KINDS
from .parameters import Kind
from .plan import Plan
from .search import Found, as_dict, overrides_of, shortfall, why

_HOSTS_SHOWN = 4


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _short(count: int) -> str:
    return f"{count / 1e9:,.2f} B" if count >= 1e9 else f"{count / 1e6:,.1f} M"


def gib(count: float) -> str:
    return f"{count / 2**30:,.2f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines; the first column to the left, the others to the right."""
    every = [tuple(heads), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    for row in every:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        yield "  " + "  ".join(cells).rstrip()


def plan_lines(plan: Plan) -> Iterator[str]:
    """The whole report."""
    work, layout = plan.work, plan.work.layout
    config, model = work.config, work.model
    size = f"{_short(model.num_parameters)} parameters"
    if model.num_active_parameters != model.num_parameters:
        size += f", {_short(model.num_active_parameters)} of them active"
    yield (
        f"{config.model.name} {config.model.flavor}, {size}, "
        f"{config.training.mixed_precision_param}, on {layout.world_size} × {plan.device.name}"
    )
    yield ""
    yield from mesh_lines(layout, plan.device.per_host)
    yield ""
    yield from parameter_lines(work.kinds, layout)
    yield ""
    yield from memory_lines(plan)
    yield ""
    yield from traffic_lines(plan)
    yield ""
    yield from time_lines(plan)
    yield ""
    yield from assumption_lines(plan)


def mesh_lines(layout: Layout, per_host: int) -> Iterator[str]:
    """Which ranks are on which host, the tensor-parallel groups in brackets."""
    hosts = -(-layout.world_size // per_host)
    yield f"mesh: {layout}, {_counted(layout.world_size, 'rank')} on {_counted(hosts, 'host')}"
    shown = range(hosts) if hosts <= _HOSTS_SHOWN else [*range(_HOSTS_SHOWN - 1), hosts - 1]
    for host in shown:
        if host == hosts - 1 > _HOSTS_SHOWN - 1:
            yield "  …"
        ranks = range(host * per_host, min((host + 1) * per_host, layout.world_size))
        groups: dict[int, list[int]] = {}
        for rank in ranks:
            groups.setdefault(rank // layout.tp, []).append(rank)
        in_stage = layout.dp_replicate * layout.fsdp
        cells = []
        for group, members in groups.items():
            stage = f"stage {group // in_stage} " if layout.pp > 1 else ""
            replica = f"replica {group % in_stage // layout.fsdp} " if layout.dp_replicate > 1 else ""
            cells.append(f"{stage}{replica}shard {group % layout.fsdp} [{' '.join(map(str, members))}]")
        yield f"  host {host}: {', '.join(cells)}"


def parameter_lines(kinds: Sequence[Kind], layout: Layout) -> Iterator[str]:
    """Each kind of parameter, and how it is split."""

    def split(kind: Kind) -> str:
        parts = [f"dim {kind.tp_dim} over tp"] if layout.tp > 1 and kind.tp_dim is not None else []
        parts += ["dim 0 over ep"] if layout.ep > 1 and kind.expert else []
        if (shards := kind.shards(layout)) > 1:
            axis = "fsdp" if shards == layout.fsdp else f"the {shards} ranks that ep leaves"
            parts.append(f"dim {kind.shard_dim(layout)} over {axis}")
        return ", ".join(parts) or "whole"

    def size(shape: tuple[int, ...]) -> str:
        return " × ".join(map(str, shape))

    yield from table(
        ("parameter", "number", "shape", "on rank 0", "split", "optimizer"),
        (
            (
                k.name,
                str(k.count),
                size(k.shape),
                size(k.local(layout)),
                split(k),
                "Muon" if k.muon else "AdamW" if k.trained else "frozen",
            )
            for k in kinds
        ),
    )


def memory_lines(plan: Plan) -> Iterator[str]:
    """By kind at the peak, and the sum at the other moments."""
    memory = plan.memory
    stages = " and ".join(str(stage.index) for stage in plan.work.stages)
    where = f"pipeline stage {stages}, " if stages else ""
    yield f"memory of the rank that needs most, GiB, at its peak ({where}{memory.peak_moment}):"
    rows = [(KINDS[kind], gib(size)) for kind, size in memory.peak.items()]
    if memory.host_copy:
        rows.append(("copy for asynchronous checkpoints" + (" (host)" if memory.on_gpu else ""), gib(memory.host_copy)))
    verdict = "fits" if plan.fits else f"DOES NOT FIT: {shortfall(plan)}"
    rows.append(("in all", f"{gib(memory.total)}"))
    yield from table(("kind", "GiB"), rows)
    yield f"  of {gib(plan.device.memory)}: {verdict}"
    yield "  at each moment: " + ", ".join(
        f"{moment} {gib(sum(parts.values()))}" for moment, parts in memory.moments.items()
    )


def traffic_lines(plan: Plan) -> Iterator[str]:
    """Collectives of a step."""
    if not plan.time.traffic:
        yield "communication: none"
        return
    work = plan.work
    yield f"communication of a rank in a step ({plan.time.hidden_share:.0%} of its time hidden behind computation):"
    sums: dict[tuple[str, str, str], int] = {}
    for each in plan.time.traffic:
        key = each.axis, each.kind, "beside computation" if each.hides else "waited for"
        sums[key] = sums.get(key, 0) + each.per_step(work)
    rows = ((axis, kind, gib(size), how) for (axis, kind, how), size in sums.items())
    yield from table(("axis", "collective", "GiB", ""), rows)


def time_lines(plan: Plan) -> Iterator[str]:
    """Phases of a step, and what follows for the run."""
    time, steps = plan.time, plan.work.config.training.steps

    def ms(seconds: float) -> str:
        return f"{1000 * seconds:,.1f}"

    yield f"a step takes {_duration(time.step_seconds)}, in ms:"
    yield from table(
        ("phase", "times", "compute", "memory", "host", "network", "hidden", "each", "bound by"),
        (
            (p.name, str(p.times), ms(p.compute), ms(p.memory), ms(p.host), ms(p.network), ms(p.hidden),
             ms(p.seconds), p.bound)
            for p in time.phases
        ),
    )  # fmt: skip
    if time.bubble:
        yield f"  the pipeline stands idle {ms(time.bubble)} of it, {time.bubble / time.step_seconds:.0%}"
    devices = plan.work.layout.world_size
    yield (
        f"  {time.tokens_per_second:,.0f} tokens/s, {time.tokens_per_second / devices:,.0f} of each rank, "
        f"MFU {time.mfu:.1%}, {_flops(time.flops)} a step"
    )
    yield (
        f"  {steps:,} steps, {_short(steps * time.tokens)} tokens: {_long_duration(plan.run_seconds)}, "
        f"{_device_hours(plan.run_seconds / 3600 * devices)}"
    )
    yield (
        f"  a checkpoint is {readable_bytes(time.checkpoint_bytes)}, {_duration(time.checkpoint_seconds)} to write; "
        f"training waits {_duration(time.checkpoint_wait)}"
    )


def assumption_lines(plan: Plan) -> Iterator[str]:
    """Everything that --assume can change."""
    yield "assumed (--assume NAME=VALUE):"
    device = {k: v for k, v in dataclasses.asdict(plan.device).items() if k not in ("name", "on_gpu")}
    every = device | dataclasses.asdict(plan.assumptions)
    yield "  " + ", ".join(f"{name} {value:g}" for name, value in every.items())


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def _long_duration(seconds: float) -> str:
    if seconds < 60:
        return _duration(seconds)
    return f"{seconds / 60:,.1f} minutes" if seconds < 3600 else f"{seconds / 3600:,.1f} hours"


def _device_hours(hours: float) -> str:
    return f"{hours:,.0f} device-hours" if hours >= 10 else f"{hours:.2g} device-hours"


def _flops(flops: float) -> str:
    return f"{flops / 1e12:,.1f} TFLOP" if flops >= 1e12 else f"{flops / 1e9:,.1f} GFLOP"


def search_lines(found: Found, *, world_size: int, least: int | None, rows: int) -> Iterator[str]:
    """The best layouts with reasons, or what is missing."""
    yield f"{found.fitting} of {found.tried} plans for {world_size} ranks fit, with {rows} rows a step"
    for number, plan in enumerate(found.best, start=1):
        yield ""
        yield (
            f"{number}. {plan.work.layout}: {_duration(plan.time.step_seconds)} a step, "
            f"{plan.time.tokens_per_second:,.0f} tokens/s, MFU {plan.time.mfu:.1%}, {gib(plan.memory.total)} of "
            f"{gib(plan.device.memory)} GiB"
        )
        yield f"   {why(plan)}"
        yield f"   {overrides_of(plan)}"
    if not found.best:
        yield from nothing_fits(found, world_size=world_size)
    yield ""
    if least is None:
        yield "no number of ranks up to 4,096 fits"
    else:
        yield f"the least number of ranks that fits is {least}"


def nothing_fits(found: Found, *, world_size: int) -> Iterator[str]:
    if found.smallest is None:
        yield (
            f"no layout of {world_size} ranks shares the rows out evenly: choose a training.global_batch_size that is "
            "a multiple of a divisor of their number"
        )
        return
    yield f"none fits; the smallest is {found.smallest.work.layout} with {gib(found.smallest.memory.total)} GiB:"
    yield f"   {shortfall(found.smallest)}"
    yield f"   {overrides_of(found.smallest)}"


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    work = plan.work
    return as_dict(plan) | {
        "device": dataclasses.asdict(plan.device),
        "assumptions": dataclasses.asdict(plan.assumptions),
        "fits": plan.fits,
        "state_bytes": dataclasses.asdict(plan.memory.state),
        "peak_moment": plan.memory.peak_moment,
        "moments_bytes": plan.memory.moments,
        "host_copy_bytes": plan.memory.host_copy,
        "parameters": [dataclasses.asdict(kind) | {"local": kind.local(plan.work.layout)} for kind in plan.work.kinds],
        "traffic": [dataclasses.asdict(each) | {"bytes_per_step": each.per_step(work)} for each in plan.time.traffic],
        "phases": [dataclasses.asdict(phase) | {"seconds": phase.seconds} for phase in plan.time.phases],
        "bubble_seconds": plan.time.bubble,
        "flops_per_step": plan.time.flops,
        "tokens_per_step": plan.time.tokens,
        "run_seconds": plan.run_seconds,
        "device_hours": plan.run_seconds * plan.work.layout.world_size / 3600,
        "checkpoint_bytes": plan.time.checkpoint_bytes,
        "checkpoint_seconds": plan.time.checkpoint_seconds,
        "checkpoint_wait": plan.time.checkpoint_wait,
    }
