"""Ranks that exchange numbers, for ``test_agreement.py``: what each got, as JSON in a file of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from torchtitan_style.train.agreement import Agreement


def main(arguments: list[str]) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    agreement = Agreement()
    got = []
    for call in range(6):
        told = call == 2 and rank == 1
        got.append(list(agreement.exchange(told, 10 * call + rank)))
        # Other collectives on the way must not get in between.
        total = torch.tensor(rank + 1)
        dist.all_reduce(total)
        assert total == sum(range(1, dist.get_world_size() + 1))
    Path(arguments[0], f"{os.environ['RANK']}.json").write_text(json.dumps(got))
    dist.barrier()
