"""Start a run: read the environment, check the configuration, prepare the data or wait for the host that does, and
start the ranks of this host.

    NPROC=4 python -m torchtitan_style.launch --config train_configs/qwen3.toml

It finds mistakes before any rank starts. A single process trains here, without a launcher; several are started by
torchrun.
"""

from __future__ import annotations

import os
from pathlib import Path

from torchtitan_style.checkpoint.folder import CheckpointFolder
from torchtitan_style.common.program import check_start
from torchtitan_style.common.reporting import reported_errors, take_stopped
from torchtitan_style.config import Config
from torchtitan_style.config.layout import plan_layout
from torchtitan_style.train.preempted import clear_preempted, is_preempted
from torchtitan_style.train.stopping import interruptible, stops_end_at_once

from . import rank
from .advice import advice
from .arguments import ConfigArguments, Hosts, parse_config_arguments, read_environment, take_restarts
from .configure import ELASTIC, fit_to_ranks, load_config
from .dry_run import DRY_RUN, dry_run
from .hosts import Membership, membership_of, share_clock
from .preflight import check_initial_weights, check_torch, preflight
from .run_lock import run_lock
from .torchrun import check_address, count_gpus, start_ranks, wait_for_host

USAGE = """\
usage: {program} [--config FILE] [--section.key VALUE ...]

  --config FILE         the configuration, a file or the name of one in train_configs/, as qwen3_8b; qwen3 if left out
  --section.key VALUE   override a key of it, as in --training.steps 100
  --max-restarts N      restarts from the last checkpoint after a process has died; 3 if left out. A single
                        process is restarted only if N is given
  --dry-run             print what the run needs in memory and time, and end; nothing is written (docs/planning.md)
  --help SECTION        every key of a section, with its default
{setup}
Environment
  NPROC, NGPU           processes on this host; {nproc} if left out
  NNODES, NODE_RANK     number of hosts, and the number of this one from 0; run the command on each.
                        NNODES=2:4: hosts may come and go, as long as there are two (docs/hosts.md)
  RDZV_ENDPOINT         host:port of the first host; needed for several hosts
  MAX_RESTARTS          as --max-restarts
"""


SETUP = """\
  --setup-only [EXTRA]  only set up (EXTRA: dev, wandb, plots), and print the Python to use; the first argument
"""


def main(arguments: list[str], *, program: str = "./run_train.sh", one_process: bool = False) -> None:
    """Train with as many processes as the environment asks for; exits with their status.

    program: the command that the user ran, for help. one_process: the default of NPROC is 1, not the number of GPUs.
    """
    nproc = "1" if one_process else "the number of GPUs, or 1,"
    usage = USAGE.format(program=program, setup="" if one_process else SETUP, nproc=nproc)
    with reported_errors():
        check_start(arguments)
        arguments, restarts = take_restarts(arguments)
        is_dry, arguments = DRY_RUN in arguments, [argument for argument in arguments if argument != DRY_RUN]
        named = parse_config_arguments(arguments, usage=usage)
        gpus = count_gpus()
        hosts = read_environment(gpus=gpus, default_nproc=1 if one_process else gpus or 1)
        if is_dry:
            fits = dry_run(load_config(named.path, named.overrides, world_size=hosts.world_size), hosts)
            raise SystemExit(0 if fits else 1)
        if hosts.world_size == 1 and not restarts:
            rank.main(arguments)
            return
        if hosts.is_elastic:
            os.environ[ELASTIC] = "1"
        config = load_config(named.path, named.overrides, world_size=None if hosts.is_elastic else hosts.world_size)
        membership = membership_of(config, hosts) if hosts.endpoint else None
        if membership and hosts.is_elastic:
            hosts = membership.fitting_hosts()
            config = fit_to_ranks(config, hosts.world_size)
        _check(config, named, hosts)
        if hosts.is_first:
            _prepare(config, hosts)
        else:
            with interruptible():
                wait_for_host(hosts.endpoint)
    _start(config, arguments, hosts, membership, max_restarts=3 if restarts is None else restarts)


def _check(config: Config, named: ConfigArguments, hosts: Hosts) -> None:
    """Raise UserError if the run is known to fail. After this a signal to stop ends the process."""
    check_torch()
    preflight(
        config,
        world_size=hosts.world_size,
        say=print,
        is_first=hosts.is_first,  # it has the folder, and may be preparing the data already
        ranks_here=hosts.nproc,
        on_gpus=hosts.gpus > 0,
        notes=advice(named.chosen, named.overrides, config),
    )
    stops_end_at_once(_leave_word_in(config, hosts))
    check_initial_weights(config)


def _leave_word_in(config: Config, hosts: Hosts) -> Path | None:
    """Where to write preempted.json if told to stop before the ranks start: the first host does it for all."""
    return Path(config.job.dump_folder) if hosts.is_first else None


def _prepare(config: Config, hosts: Hosts) -> None:
    """Prepare the data. The ranks lock the folder themselves afterwards."""
    from torchtitan_style.data.prepare.store import CorpusStore
    from torchtitan_style.data.prepare.validation_sets import check_sets, prepare_sets

    if hosts.endpoint:
        check_address(hosts.endpoint)
    folder = Path(config.job.dump_folder)
    with interruptible(folder), run_lock(folder, run=hosts.endpoint):
        check_sets(config)
        store = CorpusStore.of(config, dp=plan_layout(config.parallelism, hosts.world_size).dp)
        prepare_sets(config, store.get(say=print).tokenizer, say=print)


def _start(
    config: Config, arguments: list[str], hosts: Hosts, membership: Membership | None, *, max_restarts: int
) -> None:
    """Start the ranks of this host, and wait for them."""
    folder = Path(config.job.dump_folder)
    clear_preempted(folder)
    if membership:
        folder.mkdir(parents=True, exist_ok=True)
        share_clock(folder, say=print)
    start_ranks(
        "torchtitan_style.launch.rank",
        arguments,
        nproc=hosts.nproc,
        on_gpus=hosts.gpus > 0,
        max_restarts=max_restarts,
        shutdown_timeout=config.comm.shutdown_timeout_seconds,
        has_saved=lambda: take_stopped() or is_preempted(folder) or _is_trained(folder, config.training.steps),
        leave_word_in=_leave_word_in(config, hosts),
        membership=membership,
    )


def _is_trained(folder: Path, steps: int) -> bool:
    """Whether a run has its last checkpoint."""
    return max(CheckpointFolder(folder / "checkpoint").steps(), default=0) >= steps
