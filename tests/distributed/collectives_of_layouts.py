"""Run by test_collectives.py as the ranks of one layout: the collectives of a training step, counted.

Arguments: dp_shard cp tp tied fsdp_reshard_after_forward output.json. Left there: {"counts": by kind, "bytes": of the
gathers and sums along cp}.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import plan_layout
from torchtitan_style.data.loader import Batch, Microbatch
from torchtitan_style.distributed.world import destroy_world, init_world
from torchtitan_style.launch.configure import load_config
from torchtitan_style.optim.guard import StepGuard
from torchtitan_style.train.step import build_optimizer, build_training_model, train_step
from torchtitan_style.train.stopping import ending_at_once

KINDS = {
    "all_gather": "all-gather",
    "allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_reduce": "all-reduce",
    "allreduce": "all-reduce",
}
"""By a part of the operation's name: functional ones and those that FSDP calls are named differently."""


class CountCollectives(TorchDispatchMode):
    """All that are called inside, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        """Of a rank's side of those that blocks call by themselves."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it calls in turn comes by here
        if func.namespace in ("c10d", "_c10d_functional") and func.name().split("::")[1] not in (
            "wait_tensor",
            "_wrap_tensor_autograd",
        ):
            name = func.name()
            kind = next((kind for part, kind in KINDS.items() if part in name), name)
            self.counts[kind] += 1
            if func.namespace == "_c10d_functional":
                self.bytes[kind] += args[0].nbytes
        return func(*args, **kwargs or {})


def main() -> None:
    dp, cp, tp = map(int, sys.argv[1:4])
    tied, reshard, output = sys.argv[4:]
    flags = {
        "model.flavor": "debug",
        "optimizer.name": "adamw",  # Muon's exchange has tests of its own
        "model.tie_word_embeddings": tied.lower(),
        "parallelism.fsdp_reshard_after_forward": reshard,
        "parallelism.context_parallel_degree": cp,
        "parallelism.tensor_parallel_degree": tp,
        "training.seq_len": 16,
        "training.global_batch_size": 4 * dp,
        "training.local_batch_size": 2,  # two microbatches
    }
    line = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    config = load_config(DEFAULT_CONFIG, line, world_size=dp * cp * tp)
    world = init_world(plan_layout(config.parallelism, dp * cp * tp), timeout_seconds=300)
    model = build_training_model(config, world, warn=print)
    optimizer = build_optimizer(model, config, world)
    guard = StepGuard(config.training.spike_sigma, config.training.spike_window, world.device)
    ids = torch.arange(2 * 17).view(2, 17)
    part = Microbatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None).of_part(world.part)
    with CountCollectives() as collectives:
        train_step(model, optimizer, Batch([part, part], hash=0), step=1, config=config, world=world, guard=guard)
    if world.is_main:
        found = {"counts": collectives.counts, "bytes": collectives.bytes}
        Path(output).write_text(json.dumps(found), encoding="utf-8")
    destroy_world()


if __name__ == "__main__":
    with ending_at_once():
        main()
