"""One rank of a training run; torchrun starts as many as are wanted.

torchrun --nproc-per-node 4 -m torchtitan_style.launch.rank --config train_configs/qwen3.toml
"""

from __future__ import annotations

import sys

from torchtitan_style.common.program import begin_run

if __name__ == "__main__":
    begin_run(sys.argv[1:])  # first of all: the imports below take half a second

    from torchtitan_style.commands.train import main

    main(sys.argv[1:])
