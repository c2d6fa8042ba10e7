"""Decisions that all ranks take at the same step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from torchtitan_style.distributed.gloo import one_thread_each


class Agreement:
    """Maximum over ranks, delivered one call late.

    Made by all ranks together, and called by all equally often. The reduction runs on the CPU while the next step is
    computed, so no rank waits for it.
    """

    @one_thread_each()
    def __init__(self) -> None:
        # A group of its own: the order of its collectives does not depend on that of any others.
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._in_flight: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, *mine: int) -> Sequence[int]:
        """The maximum over ranks of each number passed in the previous call; 0 in the first call. One process gets
        its own numbers at once."""
        if self._group is None:
            return mine
        previous: Sequence[int] = [0] * len(mine)
        if self._in_flight is not None:
            numbers, work = self._in_flight
            work.wait()
            previous = numbers.tolist()
        numbers = torch.tensor(mine)
        work = dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._in_flight = numbers, work
        return previous
