"""One rank of a training run; torchrun starts as many as are wanted.

torchrun --nproc-per-node 4 -m torchtitan_style.launch.rank --config train_configs/qwen3.toml
"""

from __future__ import annotations

import sys

from torchtitan_style.commands.train import main

if __name__ == "__main__":
    main(sys.argv[1:])
