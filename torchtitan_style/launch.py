"""Check the configuration, prepare the data, then start the ranks of this host.

    NPROC=4 python -m torchtitan_style.launch --config train_configs/qwen3.toml

Mistakes are found here, before any rank starts. One process needs no launcher and trains here;
several are started by torchrun. Environment: NPROC (or NGPU), NNODES, NODE_RANK, RDZV_ENDPOINT, MAX_RESTARTS.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from .checkpoint.folder import CheckpointFolder
from .commands import train
from .commands.cli import check_initial_weights, check_torch, parse_config_arguments, reported_errors
from .commands.torchrun import check_address, count_gpus, start_ranks, wait_for_host
from .ending import interruptible
from .errors import UserError
from .preempted import clear_preempted, is_preempted
from .preflight import preflight
from .run_lock import run_lock

__all__ = ["main"]

USAGE = """\
usage: {program} [--config FILE] [--section.key VALUE ...]

  --config FILE         the configuration, a file or the name of one in train_configs/, as qwen3_8b; qwen3 if left out
  --section.key VALUE   override a key of it, as in --training.steps 100
  --max-restarts N      how often to start again from the last checkpoint when a process dies; 3 if left out,
                        for several processes (one process has nobody to start it again, unless N is given)
  --help SECTION        every key of a section, with its default
{setup}
Environment
  NPROC, NGPU           processes on this host; the number of GPUs, or 1, if left out
  NNODES, NODE_RANK     number of hosts and which one this is; start the command on each
  RDZV_ENDPOINT         host:port of the first host, for several hosts
  MAX_RESTARTS          as --max-restarts
"""


SETUP = """\
  --setup-only [EXTRA]  only set up (EXTRA: dev, wandb, plots), and print the Python to use; the first argument
"""


def main(arguments: list[str], *, program: str = "./run_train.sh") -> None:
    """Train with as many processes as asked for; exits with their status.

    program: what the user calls this, for help.
    """
    usage = USAGE.format(program=program, setup=SETUP if program == "./run_train.sh" else "")
    with reported_errors():
        arguments, restarts = _take_restarts(arguments)
        named = parse_config_arguments(arguments, usage=usage)
        gpus = count_gpus()
        nproc = _positive("NPROC", _positive("NGPU", gpus or 1))
        nnodes = _positive("NNODES", 1)
        if nproc * nnodes == 1 and not restarts:
            train.main(arguments)
            return

        from .config import load_config
        from .config.advice import advice
        from .config.layout import plan_layout

        config = load_config(named.path, named.overrides, world_size=nproc * nnodes)
        check_torch()
        node_rank = os.environ.get("NODE_RANK", "0")
        # The first host has the folder: it may be preparing the data already.
        preflight(
            config,
            world_size=nproc * nnodes,
            say=print,
            is_first=node_rank == "0",
            ranks_here=nproc,
            on_gpus=gpus > 0,
            notes=advice(named.chosen, named.overrides, config),
        )
        check_initial_weights(config)
        if gpus and nproc > gpus:
            raise UserError(
                f"NPROC: {nproc} processes need as many GPUs, but this host has {gpus}; "
                "with CUDA_VISIBLE_DEVICES= in front they train on the CPU"
            )
        if not node_rank.isdecimal() or int(node_rank) >= nnodes:
            raise UserError(f'NODE_RANK: must be a whole number from 0 to {nnodes - 1}, not "{node_rank}"')
        endpoint = os.environ.get("RDZV_ENDPOINT", "")
        if nnodes > 1 and not re.fullmatch(r".+:\d+", endpoint):
            raise UserError("RDZV_ENDPOINT: several hosts need the first one's address, as RDZV_ENDPOINT=node0:29500")
        if node_rank != "0":
            with interruptible():
                wait_for_host(endpoint)
        else:
            if nnodes > 1:
                check_address(endpoint)
            from .preparation import prepare_data

            folder = Path(config.job.dump_folder)
            with interruptible(folder), run_lock(folder):  # the ranks take it over when this is done
                prepare_data(config, dp=plan_layout(config.parallelism, nproc * nnodes).dp, say=print)
    rendezvous = ["--standalone"]
    if nnodes > 1:
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    folder = Path(config.job.dump_folder)
    clear_preempted(folder)
    start_ranks(
        [*rendezvous, f"--nnodes={nnodes}"],
        "torchtitan_style.train",
        arguments,
        nproc=nproc,
        on_gpus=gpus > 0,
        max_restarts=3 if restarts is None else restarts,
        shutdown_timeout=config.comm.shutdown_timeout_seconds,
        has_saved=lambda: is_preempted(folder) or _is_trained(folder, config.training.steps),
    )


def _is_trained(folder: Path, steps: int) -> bool:
    """Whether a run has its last checkpoint."""
    return max(CheckpointFolder(folder / "checkpoint").steps(), default=0) >= steps


def _take_restarts(arguments: list[str]) -> tuple[list[str], int | None]:
    """``arguments`` without --max-restarts, and its number; None if it is not given."""
    rest, text, name = [], os.environ.get("MAX_RESTARTS", ""), "MAX_RESTARTS"
    given = iter(arguments)
    for argument in given:
        if argument.partition("=")[0] != "--max-restarts":
            rest.append(argument)
            continue
        name = "--max-restarts"
        text = argument.partition("=")[2] if "=" in argument else next(given, "nothing")
    if not text and name == "MAX_RESTARTS":
        return rest, None
    if not text.isdecimal():
        raise UserError(f'{name}: must be a whole number, 0 or more, not "{text}"')
    return rest, int(text)


def _positive(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f'{name}: must be a whole number of at least 1, not "{text}"')
    return int(text)


if __name__ == "__main__":
    main(sys.argv[1:])
