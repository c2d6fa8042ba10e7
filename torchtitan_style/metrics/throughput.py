"""Speed, utilisation and memory over the steps since the last reading."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from torchtitan_style.common import device as devices
from torchtitan_style.distributed.world import World

_SHARE = 0.005
"""Of the time of training, what measuring the peak may take."""


class Meter:
    """Counts tokens and time. Every rank has one; ``read`` is called by all together."""

    def __init__(self, world: World, *, flops_per_token: float, dtype: torch.dtype) -> None:
        self.world, self.flops_per_token, self._dtype = world, flops_per_token, dtype
        self._began, self._measuring = time.perf_counter(), 0.0
        self._peak = math.nan
        """FLOP/s of all devices together; NaN if one of them is unknown."""
        if world.device.type == "cpu":
            dist.barrier()  # ranks that share cores measure at the same moment
        self._measure_peak()
        self._measuring = 0.0  # that was before training
        self.restart()

    def describe_peak(self) -> str:
        """What an MFU of 100% is, for a person; "" if it is unknown."""
        if math.isnan(self._peak):
            return ""
        if self.world.device.type == "cpu":
            return f"MFU is relative to {_flops(self._peak)}, the fastest matrix product measured here so far"
        count = self.world.layout.world_size
        share = f", {count} times {_flops(self._peak / count)}" if count > 1 else ""
        return f"MFU is relative to {_flops(self._peak)}{share}: the data sheet of {devices.name(self.world.device)}"

    def _measure_peak(self) -> None:
        """Measure on all ranks at once, and keep the best sum: other programs may have had the cores before."""
        start = time.perf_counter()
        peak = torch.tensor(
            devices.peak_flops(self.world.device, self._dtype) or math.nan,
            dtype=torch.float64,
            device=self.world.device,
        )
        dist.all_reduce(peak)
        self._peak = peak.item() if math.isnan(self._peak) else max(self._peak, peak.item())
        self._last_measuring = time.perf_counter() - start
        self._measuring += self._last_measuring

    def _peak_is_due(self, elapsed: float, measuring: float, last: float) -> bool:
        """Whether the time allows another measurement; the arguments are maxima over the ranks, so all agree."""
        if self.world.device.type != "cpu" or math.isnan(self._peak):
            return False
        return measuring + last <= _SHARE * elapsed

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
            [
                devices.peak_memory_gib(self.world.device),
                self._waited / elapsed,
                time.perf_counter() - self._began,
                self._measuring,
                self._last_measuring,
            ],
            dtype=torch.float64,
            device=self.world.device,
        )
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        memory, waited, *times = worst.tolist()
        speed = self._tokens / elapsed
        if self._peak_is_due(*times):
            self._measure_peak()
        achieved = speed * self.flops_per_token
        self._peak = max(self._peak, achieved)  # what was done can be done; NaN stays
        mfu = achieved / self._peak
        self.restart()
        return {
            "tokens_per_second": speed,
            "mfu": mfu if mfu == mfu else None,
            "peak_memory_gib": memory,
            "data_wait_fraction": waited,
        }


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.0f} GFLOP/s"
