"""What a device can do at most: bf16 matrix multiplications, and copies within its memory.

    python benchmarks/device_peak.py [--json peak.json]

Squares of several sizes are multiplied; the best of them counts, as the median of its repeats. A copy reads and
writes, so it moves twice its size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from race import machine, table

from torchtitan_style.common.device import current_device, peak_flops, synchronize


def seconds(action: Callable[[], Any], device: torch.device, *, repeats: int) -> float:
    """The median of ``repeats``, each of as many calls as take a tenth of a second."""
    action()
    synchronize(device)
    begin = time.perf_counter()
    action()
    synchronize(device)
    calls = max(1, min(1000, round(0.1 / (time.perf_counter() - begin))))
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            action()
        synchronize(device)
        found.append((time.perf_counter() - begin) / calls)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    device = current_device()
    on_gpu = device.type == "cuda"
    rows, flops = [], {}
    for size in (2048, 4096, 8192, 16384) if on_gpu else (1024, 2048):
        a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)
        flops[size] = 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out), device, repeats=options.repeats)  # noqa: B023
        rows.append((f"bf16 matmul, {size}³", f"{flops[size] / 1e12:,.2f} TFLOP/s"))
    source = torch.ones(2**32 if on_gpu else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source), device, repeats=options.repeats)
    rows.append((f"copy of {source.nbytes / 2**30:g} GiB", f"{bandwidth / 1e9:,.1f} GB/s"))
    best, data_sheet = max(flops.values()), peak_flops(device, torch.bfloat16) if on_gpu else None
    about = machine(device.type)
    print(f"{about['device']}, torch {about['torch']}, medians of {options.repeats}\n")
    print(table(("", "rate"), rows))
    if data_sheet:
        print(f"\nthe best is {best / data_sheet:.0%} of the {data_sheet / 1e12:,.0f} TFLOP/s that MFU is reckoned by")
    if options.json:
        figures = {"machine": about, "flops": best, "by_size": flops, "bytes_per_second": bandwidth}
        options.json.write_text(json.dumps(figures | {"data_sheet_flops": data_sheet}, indent=2) + "\n")


if __name__ == "__main__":
    main()
