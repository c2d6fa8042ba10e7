"""Deals out batches without training on them: one rank of ``test_order.py``.

Arguments: a folder with CONFIG.toml files, the number of steps, of workers, and "begin" or "resume". Leaves the hash
of each global batch in NAME.hashes, and the state after the last one in NAME.state.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from torchtitan_style.config.layout import plan_layout
from torchtitan_style.distributed.world import World, destroy_world, init_world
from torchtitan_style.launch.configure import load_config
from torchtitan_style.metrics.display import Display
from torchtitan_style.train.data import RunData
from torchtitan_style.train.stopping import ending_at_once


def deal(path: Path, world: World, steps: int, workers: int, *, resume: bool) -> None:
    config = load_config(path, ["--data.num_workers", str(workers)], world_size=world.layout.world_size)
    data = RunData(config, world, Display(is_main=False))
    state, identity = json.loads(path.with_suffix(".state").read_text()) if resume else ({}, data.identity())
    assert data.identity() == identity
    data.loader.start(state)
    hashes = []
    for _ in range(steps):
        batch = data.loader.next()
        assert len(batch.microbatches) == data.batch_plan.accumulation_steps
        whole = torch.tensor(batch.hash)
        dist.all_reduce(whole, group=world.dp_group)
        hashes.append(f"{whole.item() % 2**64:016x}")
    state = data.loader.gather_state(world.dp_group)
    data.loader.close()
    if world.is_main:
        path.with_suffix(".state").write_text(json.dumps([state, identity]))
        with path.with_suffix(".hashes").open("a") as file:
            file.write("".join(line + "\n" for line in hashes))


if __name__ == "__main__":
    with ending_at_once():
        folder, steps, workers, resume = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "resume"
        layout = plan_layout(load_config(folder / "concat.toml").parallelism, int(os.environ["WORLD_SIZE"]))
        world = init_world(layout, timeout_seconds=120)
        for path in sorted(folder.glob("*.toml")):
            deal(path, world, steps, workers, resume=resume)
        destroy_world()
