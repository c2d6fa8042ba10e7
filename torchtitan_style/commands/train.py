"""``train``: train in this process, or as one rank of several that torchrun has started.

python -m torchtitan_style train --config train_configs/qwen3.toml --training.steps 100
"""

from __future__ import annotations

import os
from pathlib import Path

from torchtitan_style.launch.configure import load_config
from torchtitan_style.launch.preflight import preflight
from torchtitan_style.train.stopping import ending_at_once, ignore_stops, interruptible, stops_end_at_once

from .cli import check_initial_weights, check_torch, check_verdict, parse_config_arguments, reported_errors

__all__ = ["USAGE", "main"]

USAGE = """\
usage: python -m torchtitan_style train [--config FILE] [--section.key VALUE ...]

Train in this process, on one device. ./run_train.sh does the same on several, and sets itself up.

  --config FILE         the configuration; train_configs/qwen3.toml if left out
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
        folder = Path(config.job.dump_folder)
        if "RANK" not in os.environ:  # else the launcher has done it
            preflight(config, world_size=1, say=print)
        if world_size == 1:
            stops_end_at_once(folder)
            if "RANK" not in os.environ:
                check_initial_weights(config)
            import torchtitan_style.launch.run  # noqa: F401  # and torch, whose import no exception may interrupt
        # Several ranks have the data prepared, and agree on when to stop from the beginning.
        with interruptible(folder, gracefully=world_size > 1):
            from torchtitan_style.launch.run import train

            train(config, world_size=world_size)
            ignore_stops()
