"""Run by test_gloo.py as two ranks: the threads of each gloo group that a run makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed import distributed_c10d

from torchtitan_style.config.layout import Layout
from torchtitan_style.distributed.world import destroy_world, init_world, set_timeout


def main() -> None:
    world = init_world(Layout(dp_replicate=1, dp_shard=1, tp=2), timeout_seconds=600)
    set_timeout(60)  # which asks for the type of each group
    groups = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
    seconds = [group.options._timeout.total_seconds() for group in groups]
    found = {"threads": [group.options._threads for group in groups], "timeouts": seconds}
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    destroy_world()


if __name__ == "__main__":
    main()
