"""``train``: train in this process, on one device, or in as many processes as NPROC and NNODES ask for.

python -m torchtitan_style train --config train_configs/qwen3.toml --training.steps 100
"""

from __future__ import annotations

import os

from torchtitan_style.launch import launcher, rank


def main(arguments: list[str]) -> None:
    """Run the command and end the process."""
    if "RANK" in os.environ:  # torchrun has started this process as one of several
        rank.main(arguments)
    else:
        launcher.main(arguments, program="python -m torchtitan_style train", one_process=True)
