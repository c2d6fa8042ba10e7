"""One rank of a training run, or the only process of one. torchrun starts as many as are wanted:

torchrun --nproc-per-node 4 -m torchtitan_style.launch.rank --config train_configs/qwen3.toml
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # first of all: the imports below take half a second
    from torchtitan_style.common.program import begin_run

    begin_run(sys.argv[1:])

from torchtitan_style.common.program import check_start, environment_number
from torchtitan_style.common.reporting import VERDICT, check_verdict, reported_errors
from torchtitan_style.train.stopping import ending_at_once, ignore_stops, interruptible, stops_end_at_once

from .advice import advice
from .arguments import parse_config_arguments
from .configure import ELASTIC, load_config
from .dry_run import planned_figures
from .preflight import check_initial_weights, check_torch, preflight
from .torchrun import count_gpus

ALLOCATOR = "PYTORCH_ALLOC_CONF"
"""torch's settings of the memory of GPUs. It reads those of the older names first."""


def main(arguments: list[str], *, usage: str = "") -> None:
    """Train as one rank, or as the only process, and end the process.

    The status is 2 after a mistake in the configuration or the corpus. usage: what ``--help`` prints.
    """
    with ending_at_once(), reported_errors():
        check_verdict()
        check_start(arguments)
        named = parse_config_arguments(arguments, usage=usage)
        world_size = environment_number("WORLD_SIZE", 1)
        config = load_config(
            named.path, named.overrides, world_size=world_size, is_elastic=bool(os.environ.get(ELASTIC))
        )
        check_torch()
        use_expandable_segments()
        folder = Path(config.job.dump_folder)
        checks = VERDICT not in os.environ and os.environ.get("RANK", "0") == "0"  # else the launcher has done it
        if checks:
            preflight(
                config,
                world_size=world_size,
                say=print,
                ranks_here=environment_number("LOCAL_WORLD_SIZE", 1),
                on_gpus=count_gpus() > 0,
                notes=advice(named.chosen, named.overrides, config),
            )
        if world_size == 1:
            stops_end_at_once(folder)
            if checks:
                check_initial_weights(config)
            import torchtitan_style.launch.run  # noqa: F401  # and torch, whose import no exception may interrupt
        # One process may be ended at once while it prepares its data. Several ranks only note a signal from the start:
        # they must agree on the step to stop at.
        with interruptible(folder, gracefully=world_size > 1):
            from .run import train

            here = environment_number("LOCAL_WORLD_SIZE", 1)
            plan = planned_figures(config, world_size=world_size, ranks_here=here, on_gpus=count_gpus() > 0)
            train(config, world_size=world_size, plan=plan)
            ignore_stops()


def use_expandable_segments() -> None:
    """Have torch, not yet imported, grow blocks of GPU memory where it would leave gaps that nothing fits into, unless
    the user has settings of their own. No effect on CPU."""
    if not {ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
        os.environ[ALLOCATOR] = "expandable_segments:True"


if __name__ == "__main__":
    main(sys.argv[1:])
