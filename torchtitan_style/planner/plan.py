"""A configuration on a layout and a device: memory and time together. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan_style.config import Config
from torchtitan_style.config.layout import Layout

from .devices import Assumptions, Device
from .memory import MemoryPlan, memory_of
from .parameters import Kind
from .timing import TimePlan, time_of
from .workload import Workload


@dataclass(frozen=True)
class Plan:
    work: Workload
    device: Device
    assumptions: Assumptions
    memory: MemoryPlan
    time: TimePlan

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.device.memory

    @property
    def run_seconds(self) -> float:
        """Of all steps of the run; validation and checkpoints not counted."""
        return self.time.step_seconds * self.work.config.training.steps


def make_plan(
    config: Config,
    layout: Layout,
    device: Device,
    assumptions: Assumptions,
    *,
    kinds: tuple[Kind, ...] | None = None,
) -> Plan:
    """Raises ValueError if the batch cannot be shared out over ``layout``.

    A CPU is shared by all its ranks: its rates are the host's, its memory is a rank's share.
    """
    sharing = 1 if device.on_gpu else min(layout.world_size, device.per_host)
    ranks = Workload.of_ranks(config, layout, on_gpu=device.on_gpu, kinds=kinds)
    # A pipeline is as slow as its slowest stage, and fits if that does which needs most.
    memory = [memory_of(work, assumptions) for work in ranks]
    most = max(range(layout.pp), key=lambda rank: memory[rank].total)
    times = (time_of(work, device, assumptions, ranks_on_device=sharing) for work in ranks)
    return Plan(
        work=ranks[most],
        device=device,
        assumptions=assumptions,
        memory=memory[most],
        time=max(times, key=lambda time: time.step_seconds),
    )
