"""One rank of a training run; torchrun starts as many as are wanted.

torchrun --nproc-per-node 4 -m torchtitan_style.train --config train_configs/qwen3.toml
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # first of all: the imports below take half a second
    from torchtitan_style.program import begin_run

    begin_run(sys.argv[1:])

from .commands.train import main

if __name__ == "__main__":
    main(sys.argv[1:])
