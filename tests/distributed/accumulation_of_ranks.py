"""Run by test_accumulation.py: gradients of several microbatches on two ranks, and the memory that they take.

Arguments: dp_replicate each_microbatch|last_microbatch output.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from tests.distributed.gradients_of_layouts import whole
from torchtitan_style.config import Config
from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import plan_layout
from torchtitan_style.data.loader import Microbatch
from torchtitan_style.distributed.init import init_weights
from torchtitan_style.distributed.world import destroy_world, init_world
from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.registry import model_config, spec_of
from torchtitan_style.train.step import build_training_model, forward_backward

MICROBATCHES, ROWS, LENGTH = 3, 2, 16


def main() -> None:
    replicate, reduce = int(sys.argv[1]), sys.argv[2]
    world_size = 2 * replicate
    flags = {
        "model.flavor": "debug",
        "parallelism.data_parallel_replicate_degree": replicate,
        "training.mixed_precision_param": "float32",
        "training.seq_len": LENGTH,
        "training.global_batch_size": world_size * MICROBATCHES * ROWS,
        "training.local_batch_size": ROWS,
    }
    line = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    config = load_config(DEFAULT_CONFIG, line, world_size=world_size)
    world = init_world(plan_layout(config.parallelism, world_size), timeout_seconds=300)
    model = build_training_model(config, world, warn=print)

    held = []

    def count(*_: object) -> None:
        """Numbers of whole gradients that are waiting to be reduced."""
        groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
        parameters = [getattr(p, "_unsharded_param", None) for group in groups for p in group.fsdp_params]
        whole_ones = [parameter.grad for parameter in parameters if parameter is not None]
        held.append(sum(grad.numel() for grad in whole_ones if grad is not None))

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (world_size, MICROBATCHES, ROWS, LENGTH + 1), generator=generator)
    mine = [Microbatch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), None) for part in ids[world.rank]]
    model.register_forward_pre_hook(count)
    tokens = torch.tensor(ids[..., 1:].numel())
    forward_backward(model, mine, tokens, reduce_each=reduce == "each_microbatch")

    with torch.random.fork_rng():
        alone = build_alone(config)
    gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    for rows in ids.flatten(0, 1):
        (alone(rows[:, :-1], rows[:, 1:])[0] / tokens).backward()
    apart = {
        name: ((gradients[name] - parameter.grad).norm() / parameter.grad.norm()).item()
        for name, parameter in alone.named_parameters()
    }
    dist.barrier()
    if world.is_main:
        numbers = sum(parameter.numel() for parameter in alone.parameters())
        Path(sys.argv[3]).write_text(json.dumps({"held": max(held) / numbers, "apart": apart}), encoding="utf-8")
    destroy_world()


def build_alone(config: Config) -> Any:
    """The same weights in one piece."""
    model = spec_of(config.model.name).build(model_config(config.model))
    model.tie_weights()
    init_weights(model, seed=config.training.seed, initial_std=model.initial_std)
    return model


if __name__ == "__main__":
    main()
