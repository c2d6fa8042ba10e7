"""Decisions that all ranks take at the same moment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from torchtitan_style.distributed.gloo import one_thread_each

__all__ = ["Agreement"]


class Agreement:
    """The greatest of what the ranks say, known to all of them one call later.

    Made by all ranks together, and called by all equally often. The numbers are on their way while a step is
    computed, so nobody waits for them; they never touch the GPU.
    """

    @one_thread_each()
    def __init__(self) -> None:
        # A group of its own: the order of its collectives does not depend on that of any others.
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._under_way: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, *mine: int) -> Sequence[int]:
        """The greatest over the ranks of each number that was passed in the last call, or 0 in the first one."""
        if self._group is None:
            return mine
        before: Sequence[int] = [0] * len(mine)
        if self._under_way is not None:
            numbers, work = self._under_way
            work.wait()
            before = numbers.tolist()
        numbers = torch.tensor(mine)
        work = dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._under_way = numbers, work
        return before
