"""The hosts of a run: which of them are there, which numbers of them can train, and what time it is for all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, tzinfo
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import clock_offset
from torchtitan_style.config import Config
from torchtitan_style.config.checks import cross_checks

from .arguments import Hosts
from .configure import fit_to_ranks

_HEARTBEATS = 6
"""Signs of life that a host gives within the time after which it counts as lost without any."""
_SAY_AFTER = 5.0
"""Seconds of waiting for other hosts before a launcher says so."""
_LOOK_AGAIN = 30.0
"""Seconds after which hosts that cannot train in their number look who is there."""


@dataclass(frozen=True)
class Membership:
    """What the launcher of each host goes by when hosts come and go."""

    hosts: Hosts
    problems: dict[int, str]
    """Of a number of hosts: why it cannot train; empty if it can."""
    rejoin_timeout: float
    """Seconds that the hosts that are left wait for further ones."""
    host_timeout: float
    """Seconds without a heartbeat after which a host counts as lost."""

    @property
    def least(self) -> int:
        return self.hosts.least or self.hosts.nnodes

    def fitting_hosts(self) -> Hosts:
        """The hosts as if they were as few as can train, which need most memory each."""
        least = min(number for number, problem in self.problems.items() if not problem)
        return dataclasses.replace(self.hosts, nnodes=least)

    def torchrun_options(self) -> list[str]:
        heartbeat = max(1, round(self.host_timeout / _HEARTBEATS))
        settings = {"keep_alive_interval": heartbeat, "keep_alive_max_attempt": round(self.host_timeout / heartbeat)}
        if self.hosts.is_elastic:
            settings |= {"last_call_timeout": max(1, round(self.rejoin_timeout)), "join_timeout": 10**7}
        conf = ",".join(f"{name}={value}" for name, value in settings.items())
        numbers = f"{self.hosts.least}:{self.hosts.nnodes}" if self.hosts.is_elastic else str(self.hosts.nnodes)
        return [f"--nnodes={numbers}", f"--rdzv-conf={conf}"]

    @contextlib.contextmanager
    def saying_whom_it_waits_for(self) -> Iterator[None]:
        """Print after some seconds that this host waits for others."""
        more = " or more" if self.hosts.is_elastic else ""
        text = f"waiting at {self.hosts.endpoint} for {hosts_text(self.least)}{more}"
        timer = threading.Timer(_SAY_AFTER, print, [text], {"flush": True})
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def wait_for_change(self, rendezvous: Any) -> None:
        """Return when another host has come, or it is time to see whether one has gone."""
        deadline = time.monotonic() + _LOOK_AGAIN
        while time.monotonic() < deadline and not rendezvous.num_nodes_waiting():
            time.sleep(1)


def membership_of(config: Config, hosts: Hosts) -> Membership:
    """For a run on several hosts. Raises UserError if no number of them can train."""
    problems = {}
    for number in range(hosts.least, hosts.nnodes + 1) if hosts.is_elastic else ():
        found = cross_checks(fit_to_ranks(config, number * hosts.nproc), number * hosts.nproc)
        problems[number] = "; ".join(problem.text for problem in found)
    if hosts.is_elastic:
        if config.training.global_batch_size == -1:
            raise UserError(
                "training.global_batch_size: with NNODES as a range it must be a number, since -1 would change with "
                "the number of hosts"
            )
        if all(problems.values()):
            raise UserError(f"NNODES: no number of hosts can train; {hosts.nnodes} hosts: {problems[hosts.nnodes]}")
    comm = config.comm
    return Membership(hosts, problems, comm.rejoin_timeout_seconds, comm.host_timeout_seconds)


def hosts_text(number: int) -> str:
    return f"{number} host{'s' if number > 1 else ''}"


def lost_hosts(rendezvous: Any, count: int) -> str:
    """The hosts whose heartbeats have stopped, or "" if all ``count`` do. rendezvous: torchrun's handler.

    torchrun itself notices only that a rank has failed, and a connection to a host without power does not.
    """
    state = getattr(getattr(rendezvous, "_state_holder", None), "state", None)
    if state is None or not state.complete or len(state.participants) >= count:
        return ""
    left = sorted(node.addr for node in state.participants)
    return f"{count - len(left)} of {count} hosts (left: {', '.join(left)})"


def watch_first_host(membership: Membership, lost: Callable[[], object]) -> None:
    """Call ``lost``, in a thread, once the host that the others meet at has given no answer for host_timeout seconds.

    torchrun asks it without a time limit. That nothing listens there is an answer: torchrun notices that itself.
    """
    host, _, port = membership.hosts.endpoint.rpartition(":")
    pause = membership.host_timeout / _HEARTBEATS

    def answers() -> bool:
        try:
            socket.create_connection((host, int(port)), timeout=pause).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return True

    def watch() -> None:
        last = time.monotonic()
        while time.monotonic() - last < membership.host_timeout:
            time.sleep(pause)
            if answers():
                last = time.monotonic()
        lost()

    threading.Thread(target=watch, name="first host", daemon=True).start()


def share_clock(folder: Path, *, say: Callable[[str], None]) -> None:
    """Have torchrun's rendezvous go by the clock of the file system of ``folder``, which all hosts see.

    It compares times that different hosts have written: one whose clock is a minute ahead would take all others for
    dead.
    """
    offset = clock_offset(folder)
    if abs(offset) < 2:
        return
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    def now(zone: tzinfo | None = None) -> datetime:
        return datetime.fromtimestamp(time.time() + offset, zone)

    dynamic_rendezvous.datetime = SimpleNamespace(now=now)  # type: ignore[misc,assignment]
    say(f"this host's clock is {abs(offset):.0f} s {'behind' if offset > 0 else 'ahead of'} that of {folder}")
