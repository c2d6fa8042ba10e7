"""One rank of ``verify --config``; the command starts as many as the layout has.

torchrun --standalone --nproc-per-node 4 -m torchtitan_style.commands.verify_rank FOLDER [TOLERANCE]
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys

if __name__ == "__main__":  # first of all: the imports below take half a second
    from torchtitan_style.common.program import begin

    begin()

from pathlib import Path

from torchtitan_style.common.program import STOP_SIGNALS
from torchtitan_style.common.reporting import reported_errors
from torchtitan_style.config.layout import plan_layout
from torchtitan_style.launch.configure import load_config
from torchtitan_style.train.stopping import ending_at_once, interruptible, stops_end_at_once


def main(folder: Path, tolerance: float | None) -> None:
    """Compare with the reference in ``folder``; rank 0 leaves ``checks.json`` there."""
    with ending_at_once(), reported_errors():
        config = load_config(folder / "config.toml", world_size=int(os.environ["WORLD_SIZE"]))
        stops_end_at_once()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        import torch  # noqa: F401  # which no exception may interrupt

        with interruptible():
            from torchtitan_style.distributed.world import destroy_world, init_world
            from torchtitan_style.verification.layout import compare

            # It warns of gathering parameters that are sharded twice, which here is meant.
            logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
            layout = plan_layout(config.parallelism, int(os.environ["WORLD_SIZE"]))
            world = init_world(layout, timeout_seconds=config.comm.init_timeout_seconds)

            def warn(line: str) -> None:
                if world.is_main:
                    print(f"warning: {line}", file=sys.stderr)

            found = {}
            for precision in dict.fromkeys(("float32", config.training.mixed_precision_param)):
                checks = compare(config, world, folder, precision=precision, warn=warn, tolerance=tolerance)
                found[precision] = [dataclasses.asdict(check) for check in checks]
            if world.is_main:
                (folder / "checks.json").write_text(json.dumps(found), encoding="utf-8")
            destroy_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else None)
