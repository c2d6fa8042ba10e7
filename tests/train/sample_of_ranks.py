"""Run by test_sample.py as two data-parallel ranks: all-gathers of a sample of text, with memory and without.

Arguments: the file for the results, [[text, all-gathers], ...].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import plan_layout
from torchtitan_style.distributed import sharding
from torchtitan_style.distributed.world import destroy_world, init_world
from torchtitan_style.launch.configure import load_config
from torchtitan_style.train.step import build_training_model
from torchtitan_style.train.stopping import ending_at_once
from torchtitan_style.train.text import continue_prompt


class Gathers(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "allgather" in func.name()
        return func(*args, **kwargs or {})


class Tokenizer:
    """Of a vocabulary of one letter each."""

    end_of_text = -1

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def main() -> None:
    line = ["--model.flavor", "debug", "--generation.max_new_tokens", "6", "--generation.prompt", "ab"]
    line += ["--parallelism.fsdp_reshard_after_forward", "always"]
    config = load_config(DEFAULT_CONFIG, line, world_size=2)
    world = init_world(plan_layout(config.parallelism, 2), timeout_seconds=60)
    model = build_training_model(config, world, warn=print)
    free = {"enough": 2**30, "little on one rank": 2**30 if world.is_main else 2**10, "enough again": 2**30}
    found = []
    for available in free.values():
        sharding.available_memory = lambda device, available=available: available
        with Gathers() as gathers:
            text = continue_prompt(
                model,
                config,
                world,
                Tokenizer(),
                step=1,
                record_progress=lambda: None,  # type: ignore[arg-type]
            )
        found.append([text, gathers.count])
        assert all(isinstance(p.data, torch.distributed.tensor.DTensor) for p in model.parameters())  # sharded again
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    destroy_world()


if __name__ == "__main__":
    with ending_at_once():
        main()
