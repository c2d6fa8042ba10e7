"""What a layout costs: the same step on one process, and split over two along each axis, side by side.

    python benchmarks/parallel.py                        # eager; on CPU two processes of one thread
    python benchmarks/parallel.py --compile block
    python benchmarks/parallel.py --rows 16 --only pp2 --only microbatches
    python benchmarks/parallel.py --model mini --rows 4 --seq-len 512 --json layouts.json
    python benchmarks/parallel.py --layouts cp2 cp2xtp2 --rows 2 --seq-len 2048
    python benchmarks/parallel.py --beside "pp2, 1F1B" --layouts "pp2, ZBVZeroBubble" --repeats 15

All contenders do the same work, one global batch, with as many threads in all as there are processes in the largest
layout. They take turns with the single process, or with what --beside names; ratios are medians over the turns. Before
the turns each layout runs some steps under torch's profiler, which tell how long rank 0 stood still until a collective
was done, and one whose collectives are counted as the backend runs them: gloo takes an all-reduce for a reduce-scatter.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from race import Racer, Turns, machine, parsed, parser_of, race, serve, start, table, write
from torch.profiler import ProfilerActivity, profile, record_function
from train_step import SHAPES, make_config, our_compile, our_step, precision

from torchtitan_style.config.layout import plan_layout
from torchtitan_style.models.qwen3.config import FLAVORS
from torchtitan_style.planner.devices import Assumptions
from torchtitan_style.planner.plan import make_plan
from torchtitan_style.planner.this_machine import measured_cpu, this_gpu

MICROBATCHES = 8
"""Of a pipeline's step."""
PP2 = ("--parallelism.pipeline_parallel_degree", "2")
CONTENDERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "one process, wrapped by FSDP2": (1, ()),
    "dp2": (2, ()),
    "dp2, parameters freed": (2, ("--parallelism.fsdp_reshard_after_forward", "always")),
    "tp2": (2, ("--parallelism.tensor_parallel_degree", "2")),
    "cp2": (2, ("--parallelism.context_parallel_degree", "2")),
    f"one process, {MICROBATCHES} microbatches": (1, ()),
    "pp2, 1F1B": (2, PP2),
    "pp2, GPipe": (2, (*PP2, "--parallelism.pipeline_parallel_schedule", "GPipe")),
    "pp2, Interleaved1F1B": (2, (*PP2, "--parallelism.pipeline_parallel_schedule", "Interleaved1F1B")),
    "pp2, ZBVZeroBubble": (2, (*PP2, "--parallelism.pipeline_parallel_schedule", "ZBVZeroBubble")),
}
"""Name → number of processes and command line for our config."""


def microbatches_of(name: str) -> int | None:
    """How many a step of this contender has, if not one."""
    return MICROBATCHES if "pp2" in name or "microbatches" in name else None


AXES = {"cp": "context", "tp": "tensor"}


def layout(name: str) -> tuple[int, tuple[str, ...]]:
    """As in CONTENDERS, of a name as "cp2" or "dp2xtp2"."""
    if name in CONTENDERS:
        return CONTENDERS[name]
    processes, line = 1, []
    for part in name.split("x"):
        axis, degree = part[:2], part[2:]
        if axis not in ("dp", *AXES) or not degree.isdecimal():
            raise SystemExit(f"{name}: a layout is a name as cp2 or dp2xtp2, of the axes dp, {', '.join(AXES)}")
        processes *= int(degree)
        if axis in AXES:
            line += [f"--parallelism.{AXES[axis]}_parallel_degree", degree]
    return processes, tuple(line)


WARM_UP, PROFILED = 3, 5
"""Steps."""

BYTES = {"BFloat16": 2, "Half": 2, "Float": 4, "Int": 4, "Double": 8, "Long": 8, "Bool": 1, "Byte": 1}


# The contenders, each in its own processes


def contend(name: str, arguments: argparse.Namespace, turns: Turns) -> None:
    """Serve a layout's steps, after a look at its communication. Does not return."""
    processes, given = layout(name)
    if name == "one process, wrapped by FSDP2":
        wrap_always()
    step = our_step(
        arguments,
        turns.device,
        *given,
        *our_compile(arguments.compile),
        world_size=processes,
        microbatches=microbatches_of(name) or 1,
    )
    for _ in range(WARM_UP):
        step()
    found = {**collectives(step), **waiting(step, turns.device)}
    if dist.get_rank() == 0:
        Path(arguments.communication).write_text(json.dumps(found), encoding="utf-8")
    serve(turns, step)


def wrap_always() -> None:
    """Have a single process use FSDP2, which it does without otherwise."""
    from torchtitan_style.distributed.sharding import shard
    from torchtitan_style.models.qwen3 import parallelize

    def wrap(model: Any, dtype: torch.dtype) -> None:
        mesh = dist.device_mesh.init_device_mesh(
            "cuda" if torch.cuda.is_available() else "cpu", (1, 1), mesh_dim_names=("dp_replicate", "fsdp")
        )
        shard(
            model,
            model.model.layers,
            mesh,
            param_dtype=dtype,
            reduce_dtype=torch.float32,
            reshard_after_forward=True,
        )

    parallelize.compute_in = wrap


def collectives(step: Callable[[], None]) -> dict[str, Any]:
    """Number and bytes of the collectives of a step, by kind. The bytes of one are those of its larger side."""
    before = recorded()
    step()
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for entry in recorded():
        if entry["record_id"] > max((e["record_id"] for e in before), default=-1):
            kind = entry["profiling_name"].split(":")[-1].strip("_")
            counts[kind] += 1
            sizes[kind] += max(
                sum(math.prod(s) * BYTES[d] for s, d in zip(entry[f"{x}_sizes"], entry[f"{x}_dtypes"], strict=True))
                for x in ("input", "output")
            )
    return {"collectives": counts, "bytes": sizes}


def recorded() -> list[dict[str, Any]]:
    """The last collectives, as torch's flight recorder has them."""
    from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]

    return json.loads(_dump_fr_trace_json(includeCollectives=True, onlyActive=False)).get("entries", [])


def waiting(step: Callable[[], None], device: str) -> dict[str, Any]:
    """Share of a step's time that this rank stands still until a collective is done: the median of some steps.

    On a GPU this is the share of its time that collectives take, whether or not it computes beside them.
    """
    on_gpu = device.startswith("cuda")
    work: Any = dist.Work
    wait = work.wait

    def recorded_wait(self: Any, *given: Any, **named: Any) -> Any:
        with record_function("wait"):
            return wait(self, *given, **named)

    work.wait = recorded_wait
    shares = []
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    for _ in range(PROFILED):
        with profile(activities=activities) as profiler:
            began = time.perf_counter()
            step()
            if on_gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        events = profiler.key_averages()
        if on_gpu:
            waited = sum(event.self_device_time_total for event in events if event.key.startswith("nccl"))
        else:
            waited = sum(e.cpu_time_total for e in events if e.key in ("wait", "_c10d_functional::wait_tensor"))
        shares.append(waited / 1e6 / seconds)
    work.wait = wait
    return {"waiting": statistics.median(shares), "waiting_of_steps": shares}


# The benchmark


def main() -> None:
    parser = parser_of(__doc__, None, [*FLAVORS, *SHAPES])
    parser.add_argument("--layouts", nargs="+", metavar="NAME", help="to compare, as cp2 dp2xtp2")
    parser.add_argument("--beside", default="one process", metavar="NAME", help="what they are compared with")
    parser.add_argument("--compile", default="eager", choices=["eager", "block", "model"])
    parser.add_argument("--communication", help=argparse.SUPPRESS)
    arguments = parsed(parser)
    arguments.recompute = "none"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.serve:
        contend(arguments.serve, arguments, Turns(device))
    make_config(arguments)  # so that a mistake shows at once
    others = arguments.layouts or list(CONTENDERS)
    names = [arguments.beside, *(name for name in others if name != arguments.beside)]
    racers = race(names, lambda name: begin(name, arguments), arguments)
    about = machine(device)
    report(arguments, racers, about)
    write(arguments, about, racers)


def begin(name: str, arguments: argparse.Namespace) -> Racer:
    """Start a contender; what it found about its communication comes back with it."""
    processes = layout(name)[0]
    threads = max((os.cpu_count() or 2) // processes, 1) if torch.cuda.is_available() else 2 // processes
    with TemporaryDirectory() as folder:
        file = Path(folder) / "communication.json"
        racer = start(
            name,
            __file__,
            arguments,
            "--compile",
            arguments.compile,
            "--communication",
            str(file),
            processes=processes,
            threads=threads,
            environment={"TORCH_FR_BUFFER_SIZE": "10000"},
        )
        racer.warm_up(1)
        racer.more = json.loads(file.read_text(encoding="utf-8"))
        return racer


def planned(names: list[str], arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of each layout as ``plan`` has them, for this machine as it is now."""
    most = max(layout(name)[0] for name in names)
    device = this_gpu() if torch.cuda.is_available() else measured_cpu(most)
    seconds = {}
    for name in names:
        processes, given = layout(name)
        line = (*given, *our_compile(arguments.compile))
        if microbatches := microbatches_of(name):
            line += ("--training.local_batch_size", str(arguments.rows // microbatches))
        config = make_config(arguments, *line, world_size=processes)
        mesh = plan_layout(config.parallelism, processes)
        seconds[name] = make_plan(config, mesh, device, Assumptions()).time.step_seconds
    return seconds


def report(arguments: argparse.Namespace, racers: list[Racer], about: dict[str, str]) -> None:
    per_step = arguments.rows * arguments.seq_len
    plans = planned([racer.name for racer in racers], arguments)
    reference = plans[racers[0].name]
    rows = []
    for racer in racers:
        found = racer.more
        found["planned_seconds"] = plans[racer.name]
        by_kind = ", ".join(
            f"{count} {kind.replace('_', '-')} ({found['bytes'][kind] / 2**20:,.1f} MiB)"
            for kind, count in sorted(found["collectives"].items())
        )
        rows.append(
            (
                racer.name,
                f"{per_step / racer.step_seconds:,.0f}",
                f"{racer.ratio:.2f}",
                f"{plans[racer.name] / reference:.2f}",
                f"{plans[racer.name] / racer.step_seconds:.2f}",
                by_kind,
                f"{found['waiting']:.0%}",
                f"{racer.memory / 2**20:,.0f}",
            )
        )
    print(
        f"\n{arguments.model}, {arguments.rows} rows of {arguments.seq_len}, {precision()}, {arguments.compile}; "
        f"{about['device']}, torch {about['torch']}; medians of {arguments.repeats} turns of {arguments.steps} steps\n"
    )
    heads = (
        "",
        "tokens/s",
        f"× time of {racers[0].name}",
        "planned ×",
        "planned / measured",
        "collectives of a step",
        "waiting",
        "MiB of rank 0",
    )
    print(table(heads, rows))


if __name__ == "__main__":
    main()
