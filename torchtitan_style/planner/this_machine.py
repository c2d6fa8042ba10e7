"""The device that this process would train on, as a plan sees it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator

import torch

from torchtitan_style.common import device as devices
from torchtitan_style.common.errors import UserError
from torchtitan_style.common.memory import gpu_memory, host_memory

from .devices import DEVICES, Device


def this_gpu() -> Device:
    """The GPU of this machine. Raises UserError if the table does not have it."""
    name = torch.cuda.get_device_name()
    known = {"A100": "A100-80", "H100": "H100", "H200": "H200", "B200": "B200", "MI300X": "MI300X", "4090": "RTX4090"}
    found = [device for part, device in known.items() if part in name]
    if not found:
        raise UserError(
            f"--device: {name} is not in the table of devices; name the most similar of {', '.join(DEVICES)}"
        )
    room = gpu_memory()
    device = DEVICES[found[0]]
    return device if room is None else dataclasses.replace(device, memory=room.total)


def measured_cpu(ranks: int, *, copied: int = 2**24) -> Device:
    """This machine's CPU, which ``ranks`` share: measured in about a second, with the threads of all of them.

    copied: numbers that are copied to measure the memory's bandwidth; best more than the caches hold.
    """
    cpu = torch.device("cpu")
    room = host_memory()
    with _threads_of(ranks):
        bandwidth = _copy_bandwidth(copied)
        flops = {dtype: devices.peak_flops(cpu, dtype) or 1e11 for dtype in (torch.bfloat16, torch.float32)}
    return Device(
        name="cpu",
        memory=(2**34 if room is None else room.total) // ranks,
        bf16_flops=flops[torch.bfloat16],
        fp32_flops=flops[torch.float32],
        memory_bandwidth=bandwidth,
        link_bandwidth=bandwidth / 16,  # gloo copies from and to sockets on both sides
        network_bandwidth=1.25e8,
        per_host=ranks,
        on_gpu=False,
    )


@contextlib.contextmanager
def _threads_of(ranks: int) -> Iterator[None]:
    """As many threads meanwhile as ``ranks`` together have: all cores, or what OMP_NUM_THREADS gives each of them."""
    before, cores = torch.get_num_threads(), os.cpu_count() or 1
    each = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(min(cores, ranks * int(each)) if each.isdecimal() and int(each) else cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _copy_bandwidth(numbers: int) -> float:
    """Bytes read and written per second by a copy of so many fp32 numbers."""
    source = torch.ones(numbers)
    target = torch.empty_like(source)
    target.copy_(source)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / best
