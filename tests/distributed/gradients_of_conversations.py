"""Run by test_chat_gradients.py as the ranks of one layout: loss and gradients of the first batch of a run.

Arguments: config.toml, and the file for them, a safetensors file with "loss" beside the parameters' names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from torchtitan_style.config.layout import plan_layout
from torchtitan_style.distributed.world import destroy_world, init_world
from torchtitan_style.launch.configure import load_config
from torchtitan_style.train.step import forward_backward
from torchtitan_style.train.stopping import ending_at_once
from torchtitan_style.train.trainer import Trainer


def main() -> None:
    path, output, *overrides = sys.argv[1:]
    world_size = int(os.environ["WORLD_SIZE"])
    config = load_config(path, overrides, world_size=world_size)
    world = init_world(plan_layout(config.parallelism, world_size), timeout_seconds=120)
    trainer = Trainer(config, world)
    trainer.resume.start()
    trainer.data.loader.start({})
    batch = trainer.data.next_batch()
    tokens = torch.stack([(part.labels != -100).sum() for part in batch.microbatches]).sum()
    dist.all_reduce(tokens, group=world.batch_group)
    loss = forward_backward(trainer.model, batch.microbatches, tokens) * world.counts
    dist.all_reduce(loss)
    found = {"loss": loss.float(), "tokens": tokens.float()}
    for name, parameter in trainer.model.named_parameters():
        grad = parameter.grad
        found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).contiguous()
    if world.is_main:
        save_file(found, Path(output))
    trainer.watchdog.close()
    destroy_world()


if __name__ == "__main__":
    with ending_at_once():
        main()
