"""torchrun's agent, which starts and watches the ranks of a host, with changes.

It does not restart a run whose ranks have reported an error that a restart would only repeat, and it says which signal
killed a rank. On several hosts it notices when one is lost. Of a run whose hosts may change in number it starts the
ranks again when a host comes or goes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

from torchtitan_style.common.memory import oom_kills
from torchtitan_style.common.reporting import VERDICT, take_stopped

from .hosts import Membership, hosts_text, lost_hosts

_GRACE = 5
"""Seconds that the other ranks have to end in after one has reported an error. There is nothing left to save."""


@dataclass
class AgentState:
    """What the agent has seen, for the launcher."""

    has_started: bool = False
    """Whether ranks were started."""
    failure: str = "a rank failed"
    """How the first rank of the last attempt ended."""
    ranks: tuple[int, ...] = ()
    """Processes of the ranks of this host."""
    lost: str = ""
    """The hosts that were lost during the attempt."""
    failure_counted: bool = False
    """Whether the attempt was ended by a failure, which took one of the restarts."""

    def kill_ranks(self) -> None:
        for pid in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def install_agent(membership: Membership | None) -> AgentState:
    """Have torchrun use the agent of this module, in this process. membership: of a run on several hosts."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher import api

    state = AgentState()

    class Agent(LocalElasticAgent):
        # All overridden methods are private; each calls the one of torch, with whatever arguments it is given.

        def _rendezvous(self, worker_group: Any) -> None:
            if membership is None:
                super()._rendezvous(worker_group)
                return
            before = worker_group.group_world_size if state.has_started else None
            while True:
                with membership.saying_whom_it_waits_for():
                    super()._rendezvous(worker_group)
                hosts = worker_group.group_world_size
                if not (problem := membership.problems.get(hosts, "")):
                    break
                print(f"{hosts_text(hosts)} cannot train, and wait for a change in their number: {problem}", flush=True)
                membership.wait_for_change(worker_group.spec.rdzv_handler)
            if before not in (None, hosts):
                print(f"training continues with {hosts_text(hosts)} ({before} before)", flush=True)
                if state.failure_counted:  # losing a host is no fault that repeats itself
                    self._remaining_restarts += 1
            state.failure_counted = False

        def _start_workers(self, *args: Any, **kwargs: Any) -> Any:
            self._oom_kills = oom_kills()
            state.has_started, state.lost = True, ""
            take_stopped()
            started = super()._start_workers(*args, **kwargs)
            state.ranks = tuple(self._pcontext.pids().values()) if self._pcontext else ()
            return started

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if result.is_failed():
                self._judge(result.failures)
            elif membership and result.state == WorkerState.HEALTHY:
                self._look_for_lost_hosts(worker_group)
            elif result.state == WorkerState.SUCCEEDED and _goes_on(membership):
                print("the hosts have changed: the ranks have saved, and restart", flush=True)
                self._restart_workers(worker_group)
                return RunResult(state=WorkerState.HEALTHY)
            return result

        def _look_for_lost_hosts(self, worker_group: Any) -> None:
            """Kill the ranks if a host is lost: their collectives would wait for it until the watchdog ends them."""
            lost = lost_hosts(worker_group.spec.rdzv_handler, worker_group.group_world_size)
            if lost and not state.lost:
                state.lost = lost
                state.kill_ranks()

        def _judge(self, failures: dict[int, Any]) -> None:
            if _is_reported():
                self._remaining_restarts = 0
                return
            rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
            state.failure = describe_end(rank, first.exitcode, memory_ran_out=oom_kills() > self._oom_kills)
            if state.lost and membership:
                state.failure = f"no heartbeat for {membership.host_timeout:g} s from {state.lost}"
            if self._remaining_restarts:
                state.failure_counted = True
                total = self._worker_group.spec.max_restarts
                number = total - self._remaining_restarts + 1
                print(f"{state.failure}; restarting all ranks ({number} of {total})", file=sys.stderr, flush=True)

        def _stop_workers(self, *args: Any, **kwargs: Any) -> Any:
            if _is_reported() and self._pcontext is not None:
                self._pcontext.close(signal.SIGTERM, timeout=_GRACE)
            return super()._stop_workers(*args, **kwargs)

    api.LocalElasticAgent = Agent  # type: ignore[misc]
    return state


def _goes_on(membership: Membership | None) -> bool:
    """Whether the ranks have ended because a host comes or goes. This launcher itself was not told to stop."""
    return membership is not None and membership.hosts.is_elastic and take_stopped()


def _is_reported() -> bool:
    return os.path.exists(os.environ.get(VERDICT, ""))


def describe_end(rank: int, exitcode: int, *, memory_ran_out: bool) -> str:
    """How a rank ended, as "rank 1 was killed by SIGKILL". exitcode: negative for a signal."""
    if exitcode >= 0:
        return f"rank {rank} exited with status {exitcode}"
    text = f"rank {rank} was killed by {_signal_name(-exitcode)}"
    if exitcode == -signal.SIGKILL and memory_ran_out:
        text += (
            ": the kernel has killed processes because the host ran out of memory; a smaller "
            'training.local_batch_size or activation_checkpoint.mode = "full" needs less'
        )
    return text


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
