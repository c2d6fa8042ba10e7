"""``train``: train in this process, on one device, or in as many processes as NPROC and NNODES ask for.

python -m torchtitan_style train --config train_configs/qwen3.toml --training.steps 100
"""

from __future__ import annotations

import argparse
import os

from torchtitan_style.launch import launcher, rank

from .completion import COMPLETING, add_keys, complete


def main(arguments: list[str]) -> None:
    """Run the command and end the process."""
    if COMPLETING in os.environ:
        _complete()
    elif "RANK" in os.environ:  # torchrun has started this process as one of several
        rank.main(arguments)
    else:
        launcher.main(arguments, program="python -m torchtitan_style train", one_process=True)


def _complete() -> None:
    """Offer what the launcher reads without a parser."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--max-restarts")
    parser.add_argument("--dry-run", action="store_true")
    add_keys(parser)
    complete(parser)
