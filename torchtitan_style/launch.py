"""Check the configuration, prepare the data, then start the ranks of this host.

    NPROC=4 python -m torchtitan_style.launch --config train_configs/qwen3.toml

Mistakes are found here, before any rank starts. One process needs no launcher and trains here;
several are started by torchrun. Environment: NPROC (or NGPU), NNODES, NODE_RANK, RDZV_ENDPOINT.
"""

from __future__ import annotations

import os
import sys

from .commands import train
from .commands.cli import check_initial_weights, check_torch, parse_config_arguments, reported_errors
from .commands.torchrun import count_gpus, start_ranks
from .errors import UserError

__all__ = ["main"]

USAGE = """\
usage: [NPROC=N] ./run_train.sh [--config FILE] [--section.key VALUE ...]

  --config FILE         the configuration; train_configs/qwen3.toml if left out
  --section.key VALUE   override a key of it, as in --training.steps 100
  --help SECTION        every key of a section, with its default

Environment
  NPROC, NGPU           processes on this host; the number of GPUs, or 1, if left out
  NNODES, NODE_RANK     number of hosts and which one this is; start the command on each
  RDZV_ENDPOINT         host:port of the first host, for several hosts
"""


def main(arguments: list[str]) -> None:
    """Train with as many processes as asked for; exits with their status."""
    with reported_errors():
        named = parse_config_arguments(arguments, usage=USAGE)
        gpus = count_gpus()
        nproc = _positive("NPROC", _positive("NGPU", gpus or 1))
        nnodes = _positive("NNODES", 1)
        if nproc * nnodes == 1:
            train.main(arguments)
            return

        from .config import load_config
        from .config.layout import plan_layout

        config = load_config(named.path, named.overrides, world_size=nproc * nnodes)
        check_torch()
        check_initial_weights(config)
        if gpus and nproc > gpus:
            raise UserError(
                f"NPROC: {nproc} processes need as many GPUs, but this host has {gpus}; "
                "with CUDA_VISIBLE_DEVICES= in front they train on the CPU"
            )
        node_rank = os.environ.get("NODE_RANK", "0")
        if not node_rank.isdecimal() or int(node_rank) >= nnodes:
            raise UserError(f'NODE_RANK: must be a whole number from 0 to {nnodes - 1}, not "{node_rank}"')
        if nnodes > 1 and "RDZV_ENDPOINT" not in os.environ:
            raise UserError("RDZV_ENDPOINT: several hosts need the first one's address, as RDZV_ENDPOINT=node0:29500")
        if node_rank == "0":
            from .preparation import prepare_data

            prepare_data(config, dp=plan_layout(config.parallelism, nproc * nnodes).dp, say=print)
    rendezvous = ["--standalone"]
    if nnodes > 1:
        endpoint = os.environ["RDZV_ENDPOINT"]
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--node-rank={node_rank}"]
    start_ranks([*rendezvous, f"--nnodes={nnodes}"], "torchtitan_style.train", arguments, nproc=nproc, on_gpus=gpus > 0)


def _positive(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f'{name}: must be a whole number of at least 1, not "{text}"')
    return int(text)


if __name__ == "__main__":
    main(sys.argv[1:])
