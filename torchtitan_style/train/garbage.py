"""Garbage collection on all ranks at the same steps."""

from __future__ import annotations

import gc


class GarbageCollector:
    """Turns automatic collection off and collects every so many steps.

    Left to itself Python collects on each rank at another moment, and in a collective all others
    wait for the one that does.
    """

    def __init__(self, *, every: int) -> None:
        self.every, self._steps = every, 0
        gc.collect()
        gc.disable()

    def step(self) -> None:
        self._steps += 1
        if self._steps % self.every == 0:
            gc.collect(1)
