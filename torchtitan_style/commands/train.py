"""One rank of a run: the only one, or one of several that torchrun has started.

The ``train`` command is ``launch.py``, which calls this where one process is enough.
"""

from __future__ import annotations

import os
from pathlib import Path

from torchtitan_style.config import load_config
from torchtitan_style.config.advice import advice
from torchtitan_style.ending import ending_at_once, interruptible
from torchtitan_style.preflight import preflight

from .cli import check_initial_weights, check_torch, check_verdict, parse_config_arguments, reported_errors
from .torchrun import count_gpus

__all__ = ["USAGE", "main"]

USAGE = """\
usage: torchrun ... -m torchtitan_style.train [--config FILE] [--section.key VALUE ...]

Train as one rank of those that torchrun starts. python -m torchtitan_style train starts them itself.

  --config FILE         the configuration, a file or the name of one in train_configs/, as qwen3_8b; qwen3 if left out
  --section.key VALUE   override a key of it, as in --training.steps 100
  --help SECTION        every key of a section, with its default
"""


def main(arguments: list[str]) -> None:
    """Run the command and end the process: status 2 after a mistake in the configuration or the corpus."""
    with ending_at_once(), reported_errors():
        check_verdict()
        named = parse_config_arguments(arguments, usage=USAGE)
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        config = load_config(named.path, named.overrides, world_size=world_size)
        check_torch()
        if "RANK" not in os.environ:  # else the launcher has done it
            notes = advice(named.chosen, named.overrides, config)
            preflight(config, world_size=1, say=print, on_gpus=count_gpus() > 0, notes=notes)
            check_initial_weights(config)
        # Several ranks have the data prepared, and agree on when to stop from the beginning.
        with interruptible(Path(config.job.dump_folder), gracefully=world_size > 1):
            from torchtitan_style.trainer import train  # imports torch

            train(config, world_size=world_size)
