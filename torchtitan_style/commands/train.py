"""``train``: train in this process, on one device, or on as many as NPROC and NNODES say.

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
