"""Starting the ranks of this host."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.program import STOP_SIGNALS
from torchtitan_style.common.reporting import VERDICT, verdict_status
from torchtitan_style.train.stopping import end_at_once, ignore_stops, stops_end_at_once

from .agent import AgentState, install_agent
from .hosts import Membership, watch_first_host


def count_gpus() -> int:
    """Number of GPUs that a process here can use, without importing torch, which takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() and part.strip() != "-1"])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def check_address(endpoint: str) -> None:
    """Raise UserError if the host in ``endpoint`` (host:port) is unknown; torchrun would retry for minutes."""
    try:
        socket.getaddrinfo(endpoint.rpartition(":")[0], None)
    except (OSError, UnicodeError) as error:
        raise UserError(f"RDZV_ENDPOINT: {endpoint}: {getattr(error, 'strerror', None) or error}") from None


def wait_for_host(endpoint: str) -> None:
    """Return once something listens at ``endpoint`` (host:port). torchrun gives up after a minute, but the first host
    may take hours to prepare the data."""
    host, _, port = endpoint.rpartition(":")
    said = ""
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
            return
        except OSError as error:
            if said != str(error):
                said = str(error)
                print(f"waiting for the first host, which prepares the data: {endpoint}: {said}", flush=True)
        time.sleep(1)


def start_ranks(
    module: str,
    arguments: list[str],
    *,
    nproc: int,
    on_gpus: bool,
    max_restarts: int = 0,
    shutdown_timeout: int = 30,
    has_saved: Callable[[], bool] = lambda: False,
    leave_word_in: Path | None = None,
    membership: Membership | None = None,
) -> None:
    """Run ``nproc`` processes of ``python -m module arguments`` under torchrun, and wait for them.

    max_restarts: how often to restart all ranks after one has died, unless it reported why. shutdown_timeout: seconds
    that the ranks have to save in when this process is told to stop. has_saved: whether they did. leave_word_in: where
    to leave preempted.json if told to stop before the ranks start. membership: of a run on several hosts.

    Exits if a rank fails: with status 2 after a UserError, else with 1; with 128 + the number of the signal if this
    process is told to stop, unless the ranks have saved. torchrun's own log of failures is off: the ranks report
    errors themselves, and what the agent sees is printed here.
    """
    if not on_gpus:
        # Left alone each process would take all cores, and torchrun would give each a single one.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # With torchrun's own store the ranks of a restart find the addresses of those before them (torch 2.13, gloo).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    sys.stdout.flush()
    stops_end_at_once(leave_word_in)  # until torchrun is imported

    import logging

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    told = signal.SIGTERM
    too_early = False

    def end(number: int, _frame: object) -> None:
        nonlocal told, too_early
        told = signal.Signals(number)
        too_early = signal.getsignal(signal.SIGTERM) is end  # torchrun puts its own in place as it starts the ranks
        raise SignalException(f"told to stop by {told.name}", signal.SIGTERM)

    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own
    agent = install_agent(membership)
    command = [f"--nproc-per-node={nproc}", f"--max-restarts={max_restarts}"]
    if membership:
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={membership.hosts.endpoint}"]
        command += membership.torchrun_options()
        if not membership.hosts.is_first:
            watch_first_host(membership, lambda: _lose_first_host(agent, membership))
    else:
        command += ["--standalone", "--nnodes=1"]
    if any("--shutdown-timeout" in action.option_strings for action in run.get_args_parser()._actions):  # torch 2.13
        command.append(f"--shutdown-timeout={shutdown_timeout}")
    elif shutdown_timeout != 30:
        print("warning: this version of torchrun kills the ranks 30 s after a signal to stop, and ignores "
              "comm.shutdown_timeout_seconds", file=sys.stderr)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        os.environ[VERDICT] = str(Path(folder) / "verdict")
        try:
            for number in STOP_SIGNALS:  # torchrun takes over all but SIGUSR1
                signal.signal(number, end)
            _have_ranks_start_with_signals_blocked()
            run.main([*command, "-m", module, *arguments])
            ignore_stops()
        except SignalException as received:
            if not too_early and not has_saved():
                raise SystemExit(128 + (told if received.sigval == signal.SIGTERM else received.sigval)) from None
        except RendezvousError as error:
            if agent.has_started and membership and membership.hosts.is_elastic and not _is_closed(error):
                _lose_first_host(agent, membership)
            if agent.has_started:
                print("error: another host has ended the run, or is lost; its output says why", file=sys.stderr)
                raise SystemExit(1) from None
            print(f"error: this host cannot join the others: {error}; check that RDZV_ENDPOINT names the first host "
                  "and a port that is free there", file=sys.stderr)  # fmt: skip
            raise SystemExit(2) from None
        except ChildFailedError:
            status = verdict_status()
            if status is None:
                print(f"error: {agent.failure}", file=sys.stderr)
            raise SystemExit(status or 1) from None
    if too_early:
        end_at_once(told, leave_word_in)


def _lose_first_host(agent: AgentState, membership: Membership) -> NoReturn:
    """End, or in an elastic run begin again, since the host that the others meet at does not answer any more.

    May be called by any thread: the main thread may be waiting for an answer of that host, and would not return.
    """
    agent.kill_ranks()
    shutil.rmtree(Path(os.environ[VERDICT]).parent, ignore_errors=True)
    endpoint = membership.hosts.endpoint
    if membership.hosts.is_elastic:
        print(f"the host at {endpoint} is lost; starting again once it is back", flush=True)
        os.execv(sys.executable, sys.orig_argv)  # a process that has run torchrun once cannot do it again
    print(
        f"error: the first host, {endpoint}, has not answered for {membership.host_timeout:g} s",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _is_closed(error: Exception) -> bool:
    """Whether another host has ended the run for all."""
    from torch.distributed.elastic.rendezvous import RendezvousClosedError

    return isinstance(error, RendezvousClosedError)


def _have_ranks_start_with_signals_blocked() -> None:
    """Block signals to stop in the main thread: a rank inherits that, and a signal waits until it has its handlers.

    ``begin_run`` and ``interruptible`` unblock them. A signal that came earlier would end that rank alone, and the
    others would wait for it. Here another thread receives them, for the handlers of the main thread.
    """
    threading.Thread(target=threading.Event().wait, name="signals", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
