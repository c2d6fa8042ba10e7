"""``train --dry-run``: the plan of a run on this machine, with the processes that would be started. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable

from torchtitan_style.config import Config
from torchtitan_style.config.layout import plan_layout
from torchtitan_style.planner.devices import Assumptions
from torchtitan_style.planner.plan import Plan, make_plan
from torchtitan_style.planner.report import plan_lines

from .arguments import Hosts

DRY_RUN = "--dry-run"


def dry_run(config: Config, hosts: Hosts) -> bool:
    """Print the report. Whether the run fits."""
    from torchtitan_style.planner.this_machine import measured_cpu, this_gpu

    device = this_gpu() if hosts.gpus else measured_cpu(hosts.nproc)
    plan = make_plan(config, plan_layout(config.parallelism, hosts.world_size), device, Assumptions())
    print("\n".join(plan_lines(plan)))
    return plan.fits


def planned_figures(config: Config, *, world_size: int, ranks_here: int, on_gpus: bool) -> Callable[[], Plan | None]:
    """What a run asks for the plan with, once its first steps are done: measuring before them would delay it."""

    def plan() -> Plan | None:
        from torchtitan_style.common.errors import UserError
        from torchtitan_style.planner.this_machine import measured_cpu, this_gpu

        try:
            # Little memory: the run's own peak is compared with the plan.
            device = this_gpu() if on_gpus else measured_cpu(ranks_here, copied=2**22)
            return make_plan(config, plan_layout(config.parallelism, world_size), device, Assumptions())
        except UserError:  # a GPU that the table does not have
            return None

    return plan
