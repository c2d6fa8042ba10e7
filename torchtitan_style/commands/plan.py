"""``plan``: what a run needs in memory and time, before it is started.

python -m torchtitan_style plan --config qwen3_8b --world-size 8 --device H100
python -m torchtitan_style plan --config qwen3_32b --world-size 512 --device H100 --search
"""

from __future__ import annotations

import json
import sys

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.reporting import reported_errors
from torchtitan_style.config import Config
from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import Layout, least_world_size, plan_layout
from torchtitan_style.launch.configure import load_config
from torchtitan_style.launch.torchrun import count_gpus
from torchtitan_style.planner.devices import Assumptions, Device, device_named, with_assumptions
from torchtitan_style.planner.plan import Plan, make_plan
from torchtitan_style.planner.report import plan_as_dict, plan_lines, search_lines
from torchtitan_style.planner.search import as_dict, global_batch, least_ranks, search
from torchtitan_style.planner.workload import Workload

from .cli import Arguments

USAGE = """\
usage: python -m torchtitan_style plan [--config FILE] [--section.key VALUE ...] [--world-size N] [--device NAME]

Print what a run needs: memory of a rank by kind, what ranks send, the time of a step and of the run. Nothing is
trained, no GPU is needed, and nothing is written. Exits with 1 if it does not fit.

  --config FILE         the configuration, a file or the name of one in train_configs/; qwen3 if left out
  --section.key VALUE   override a key of it, as in --parallelism.tensor_parallel_degree 8
  --world-size N        processes; the product of the degrees if left out
  --device NAME         A100-40, A100-80, H100, H200, B200, MI300X, RTX4090, or cpu, which is measured here; this
                        machine's if left out
  --assume NAME=VALUE   another figure than the plan assumes (it lists them), as matmul_efficiency=0.6; may be repeated
  --search              try all layouts, recomputation modes and local batch sizes; print the five fastest that fit
  --json                print JSON, in bytes and seconds
"""


def main(arguments: list[str]) -> None:
    with reported_errors():
        parser = Arguments(USAGE)
        parser.add_argument("--config", default=DEFAULT_CONFIG)
        parser.add_argument("--world-size", type=int)
        parser.add_argument("--device")
        parser.add_argument("--assume", action="append", default=[])
        parser.add_argument("--search", action="store_true")
        parser.add_argument("--json", action="store_true")
        options, overrides = parser.parse_known(arguments)
        unchecked = load_config(options.config, overrides, world_size=None)
        world_size = _world_size(unchecked, options.world_size)
        device, assumptions = with_assumptions(_device(options.device, world_size), options.assume)
        if options.search:
            fits = _search(unchecked, world_size, device, assumptions, as_json=options.json)
        else:
            config = load_config(options.config, overrides, world_size=world_size)
            plan = make_plan(config, plan_layout(config.parallelism, world_size), device, assumptions)
            if plan.memory.state.total > device.memory:
                raise UserError(_too_large(plan))
            _check_layout(plan)
            print(json.dumps(plan_as_dict(plan), indent=2) if options.json else "\n".join(plan_lines(plan)))
            fits = plan.fits
        raise SystemExit(0 if fits else 1)


def _world_size(config: Config, given: int | None) -> int:
    if given is None:
        return least_world_size(config.parallelism)
    if given < 1:
        raise UserError(f"--world-size: must be at least 1, not {given}")
    return given


def _device(name: str | None, world_size: int) -> Device:
    if name is not None and name.lower() != "cpu":
        return device_named(name)
    from torchtitan_style.planner.this_machine import measured_cpu, this_gpu

    return this_gpu() if name is None and count_gpus() else measured_cpu(world_size)


def _check_layout(plan: Plan) -> None:
    """Lay the model out by the functions that training uses, for the first rank and the last, and warn if they hold
    other bytes than the plan says: a model family's ``tensor_parallel_dim`` may be wrong."""
    from torchtitan_style.planner.laid_out import lay_out, state_held
    from torchtitan_style.planner.parameters import state_of

    layout: Layout = plan.work.layout
    config, ranks = plan.work.config, sorted({0, layout.world_size - 1})
    works = Workload.of_ranks(config, layout, on_gpu=True)
    for rank in ranks:
        held = state_held(lay_out(config, layout, rank))
        planned = state_of(works[rank // plan.work.stage_ranks].kinds, layout, rank)
        if held != planned:
            print(f"warning: rank {rank} would hold {held}, and not {planned} as planned", file=sys.stderr)


def _too_large(plan: Plan) -> str:
    needed, room = plan.memory.state.total / 2**30, plan.device.memory / 2**30
    return (
        f"weights, gradients and optimizer state alone take {needed:,.1f} GiB on each rank, and {plan.device.name} has "
        f"{room:,.1f}: split them over more ranks, or choose a smaller model; --search finds how many fit"
    )


def _search(config: Config, world_size: int, device: Device, assumptions: Assumptions, *, as_json: bool) -> bool:
    found = search(config, world_size, device, assumptions)
    least = least_ranks(config, device, assumptions)
    if as_json:
        about = {"tried": found.tried, "fitting": found.fitting, "least_ranks": least}
        print(json.dumps(about | {"best": [as_dict(plan) for plan in found.best]}, indent=2))
    else:
        rows = global_batch(config, world_size)
        print("\n".join(search_lines(found, world_size=world_size, least=least, rows=rows)))
    return bool(found.best)
