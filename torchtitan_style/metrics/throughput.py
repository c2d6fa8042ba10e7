"""Speed, utilisation and memory over the steps since the last reading."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from torchtitan_style.common import device as devices
from torchtitan_style.distributed.world import World

__all__ = ["Meter"]


class Meter:
    """Counts tokens and time. Every rank has one; ``read`` is called by all together."""

    def __init__(self, world: World, *, flops_per_token: float, dtype: torch.dtype) -> None:
        self.world, self.flops_per_token = world, flops_per_token
        # What all devices together could do, if every one of them is known.
        peak = torch.tensor(devices.peak_flops(world.device, dtype) or float("nan"), device=world.device)
        dist.all_reduce(peak)
        self._peak = peak.item()
        self.restart()

    def restart(self) -> None:
        """Forget what was counted, as after something that is not training."""
        self._tokens, self._waited, self._start = 0, 0.0, time.perf_counter()

    def add_tokens(self, count: int) -> None:
        self._tokens += count

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def read(self) -> dict[str, Any]:
        """Figures since the last reading, for the whole run; starts counting anew."""
        devices.synchronize(self.world.device)
        elapsed = time.perf_counter() - self._start
        worst = torch.tensor(
            [devices.peak_memory_gib(self.world.device), self._waited / elapsed], device=self.world.device
        )
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        memory, waited = worst.tolist()
        speed = self._tokens / elapsed
        mfu = speed * self.flops_per_token / self._peak
        self.restart()
        return {
            "tokens_per_second": speed,
            "mfu": mfu if mfu == mfu else None,
            "peak_memory_gib": memory,
            "data_wait_fraction": waited,
        }
