"""torchrun's agent, which starts and watches the ranks of a host, with two changes.

It does not restart a run whose ranks have reported an error that a restart would only repeat, and it says which signal
killed a rank.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

from torchtitan_style.common.memory import oom_kills
from torchtitan_style.common.reporting import VERDICT

_GRACE = 5
"""Seconds that the other ranks have to end in after one has reported an error. There is nothing left to save."""


@dataclass
class AgentState:
    """What the agent has seen, for the launcher."""

    has_started: bool = False
    """Whether ranks were started."""
    failure: str = "a rank failed"
    """How the first rank of the last attempt ended."""


def install_agent() -> AgentState:
    """Have torchrun use the agent of this module, in this process."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher import api

    state = AgentState()

    class Agent(LocalElasticAgent):
        # All overridden methods are private; each calls the one of torch, with whatever arguments it is given.

        def _start_workers(self, *args: Any, **kwargs: Any) -> Any:
            self._oom_kills = oom_kills()
            state.has_started = True
            return super()._start_workers(*args, **kwargs)

        def _monitor_workers(self, *args: Any, **kwargs: Any) -> Any:
            result = super()._monitor_workers(*args, **kwargs)
            if result.is_failed():
                self._judge(result.failures)
            return result

        def _judge(self, failures: dict[int, Any]) -> None:
            if _is_reported():
                self._remaining_restarts = 0
                return
            rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
            state.failure = describe_end(rank, first.exitcode, memory_ran_out=oom_kills() > self._oom_kills)
            if self._remaining_restarts:
                total = self._worker_group.spec.max_restarts
                number = total - self._remaining_restarts + 1
                print(f"{state.failure}; restarting all ranks ({number} of {total})", file=sys.stderr, flush=True)

        def _stop_workers(self, *args: Any, **kwargs: Any) -> Any:
            if _is_reported() and self._pcontext is not None:
                self._pcontext.close(signal.SIGTERM, timeout=_GRACE)
            return super()._stop_workers(*args, **kwargs)

    api.LocalElasticAgent = Agent  # type: ignore[misc]
    return state


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
