"""How long pipeline schedules leave ranks idle, beside what the formulas say (config/pipeline.py).

    torchrun --nproc-per-node 2 benchmarks/pipeline_bubble.py

Stages sleep for as long as they would compute, so that neither their speed nor the load of the machine matters. A
forward pass, the gradients of inputs and those of weights take as long as one another, and all stages of a rank
together SECONDS for each.
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtitan_style.config.layout import Layout
from torchtitan_style.config.pipeline import Stage, bubble, rank_of_stage, stages_per_rank
from torchtitan_style.config.schema import PipelineSchedule
from torchtitan_style.distributed.pipeline import Activations, PipelinedModel
from torchtitan_style.distributed.world import World, init_world

SECONDS, MICROBATCHES, STEPS = 0.2, 8, 2
SCHEDULES: tuple[PipelineSchedule, ...] = ("1F1B", "GPipe", "Interleaved1F1B", "ZBVZeroBubble")
IDS = torch.ones(1, 8, dtype=torch.long)


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return gradients[0].clone(), None, None


class Part(nn.Module):
    """A stage: hidden states [B, T, 4] to hidden states, or to a loss. postpones: leaves out its weight's gradient."""

    def __init__(self, stage: Stage, seconds: float, *, postpones: bool) -> None:
        super().__init__()
        self.stage, self.seconds, self.postpones = stage, seconds, postpones
        self.config = None
        self.weight = nn.Parameter(torch.ones(1))
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(1, 1)

    def forward(self, x: Tensor, labels: Tensor, **_: Any) -> Any:
        if self.stage.is_first:
            x = torch.zeros(*x.shape, 4, requires_grad=True)
        y = Sleep.apply(x, self.seconds, self.seconds)
        if not self.postpones:
            y = y + Sleep.apply(self.weight, 0.0, self.seconds)
        return (y.sum(), labels.sum()) if self.stage.is_last else y


def idle_share(world: World, schedule: PipelineSchedule) -> float:
    """Of a step, the time beyond computing as a share of that."""
    pp, each = world.layout.pp, stages_per_rank(schedule)
    stages = [Stage(index, pp * each, range(index, index + 1)) for index in range(pp * each)]
    mine = [s for s in stages if rank_of_stage(s.index, pp=pp, schedule=schedule) == world.stage]
    model = PipelinedModel(
        [(stage, Part(stage, SECONDS / each, postpones=schedule == "ZBVZeroBubble")) for stage in mine],
        world=world,
        schedule=schedule,
        activations=Activations(4, torch.float32, 1),
        reduce_dtype=torch.float32,
        tied=False,
    )
    for gradients in model.postponed or []:
        gradients.take = lambda: partial(time.sleep, SECONDS / each)  # type: ignore[method-assign]
    seconds = []
    for _ in range(STEPS):
        dist.barrier()
        began = time.perf_counter()
        model.forward_backward([(IDS, IDS)] * MICROBATCHES, torch.tensor(1))
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    return min(seconds) / (3 * SECONDS * MICROBATCHES) - 1


def main() -> None:
    world = init_world(Layout(pp=int(os.environ["WORLD_SIZE"])), timeout_seconds=100)
    for schedule in SCHEDULES:
        measured = idle_share(world, schedule)
        if world.is_main:
            formula = bubble(schedule, pp=world.layout.pp, microbatches=MICROBATCHES)
            print(f"{schedule:16} measured {measured:6.1%}   formula {formula:6.1%}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
