"""A training run on this rank: join the other ranks, hold the dump folder, train. Imports torch."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from torchtitan_style.common.reporting import report_stopped
from torchtitan_style.config import Config
from torchtitan_style.config.layout import plan_layout
from torchtitan_style.distributed.world import World, destroy_world, init_world, on_main
from torchtitan_style.metrics.display import Display
from torchtitan_style.metrics.planned import MakePlan
from torchtitan_style.train.preempted import leave_preempted
from torchtitan_style.train.stopping import told_to_stop
from torchtitan_style.train.trainer import Trainer

from .arguments import environment_endpoint
from .run_lock import run_lock


def train(config: Config, *, world_size: int, plan: MakePlan | None = None) -> None:
    """Train as ``config`` says. Called by every rank; rank 0 holds the lock of the dump folder meanwhile.

    plan: compared with what is measured, once.
    """
    layout = plan_layout(config.parallelism, world_size)
    world = init_world(layout, timeout_seconds=config.comm.init_timeout_seconds)
    folder = Path(config.job.dump_folder)
    with contextlib.ExitStack() as stack:
        on_main(lambda: stack.enter_context(run_lock(folder, run=environment_endpoint())))
        if number := _told_to_stop_already(world):  # no need to build the model first, which may take minutes
            name = signal.Signals(number).name
            on_main(lambda: leave_preempted(folder, signal=name))
            report_stopped()
            Display(is_main=world.is_main).say(
                f"stopped before the first step by {name}. Run the same command to resume."
            )
        else:
            trainer = Trainer(config, world, plan=plan)
            trainer.run()
            if trainer.stop_signal:
                report_stopped()
    destroy_world()  # not after an error: NCCL would wait for collectives that the others will not join


def _told_to_stop_already(world: World) -> int:
    """The signal that one of the ranks was told to stop with while they started, or 0."""
    told = torch.tensor(told_to_stop(), device=world.device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)
