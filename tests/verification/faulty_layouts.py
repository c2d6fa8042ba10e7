"""Run by test_faults.py as the ranks of one layout: the layout as it is, and broken in one place after the other.

Arguments: folder with config.toml and the reference. Leaves {fault: checks} in checks.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.parallel import RowwiseParallel

from torchtitan_style.config.layout import plan_layout
from torchtitan_style.distributed import init
from torchtitan_style.distributed.world import destroy_world, init_world
from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.qwen3 import parallelize
from torchtitan_style.models.qwen3.model import Qwen3ForCausalLM
from torchtitan_style.optim import clip
from torchtitan_style.train import step
from torchtitan_style.train.stopping import ending_at_once
from torchtitan_style.verification.layout import compare

Patch = contextlib.AbstractContextManager[Any]


class WithoutReduction(RowwiseParallel):
    """Each rank keeps its part of the positions of its own partial sums."""

    @staticmethod
    def _prepare_output_fn(layouts: Any, use_local: bool, module: Any, outputs: Any, mesh: Any) -> Any:
        return outputs.to_local().chunk(mesh.size(), dim=1)[mesh.get_local_rank()].contiguous()


def with_plan(change: Callable[[dict[str, Any]], object]) -> Patch:
    """The tensor-parallel plan with something changed in it."""
    real = parallelize.parallelize_module

    def parallelize_module(model: Any, mesh: Any, plan: dict[str, Any]) -> None:
        change(plan)
        real(model, mesh, plan)

    return patch.object(parallelize, "parallelize_module", parallelize_module)


@contextlib.contextmanager
def without_token_sum() -> Iterator[None]:
    """Each data-parallel rank divides by its own tokens."""
    real = dist.all_reduce

    def all_reduce(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        is_count = tensor.ndim == 0 and not tensor.is_floating_point()
        return None if is_count else real(tensor, *args, **kwargs)

    with patch.object(step.dist, "all_reduce", all_reduce):
        yield


def other_seed_per_rank() -> Patch:
    real = init.draw
    return patch.object(init, "draw", lambda p, std, key: real(p, std, f"{key}/{dist.get_rank()}"))


FAULTS: dict[str, Callable[[], Patch]] = {
    "none": contextlib.nullcontext,
    "down_proj of layer 1 not reduced": lambda: with_plan(
        lambda plan: plan.update({"model.layers.1.mlp.down_proj": WithoutReduction()})
    ),
    "embedding and head untied": lambda: patch.object(Qwen3ForCausalLM, "tie_weights", lambda self: None),
    "input_layernorm left out of the plan": lambda: with_plan(
        lambda plan: [plan.pop(name) for name in list(plan) if name.endswith("input_layernorm")]
    ),
    "loss divided by the tokens of the rank": without_token_sum,
    "gradients averaged over ranks": lambda: patch.object(
        FSDPModule, "set_gradient_divide_factor", lambda self, factor: None
    ),
    "weights drawn by rank": other_seed_per_rank,
    "norm counts copies twice": lambda: patch.object(clip, "_copies", lambda grad: 1),
}


def main(folder: Path, faults: dict[str, Callable[[], Patch]]) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    config = load_config(folder / "config.toml", world_size=world_size)
    world = init_world(plan_layout(config.parallelism, world_size), timeout_seconds=120)
    results = {}
    for fault, breaking in faults.items():
        with breaking():
            checks = compare(config, world, folder, precision="float32", warn=print)
        results[fault] = [dataclasses.asdict(check) for check in checks]
    if world.is_main:
        (folder / "checks.json").write_text(json.dumps(results), encoding="utf-8")
    destroy_world()


if __name__ == "__main__":
    with ending_at_once():
        main(Path(sys.argv[1]), FAULTS)
