"""How much memory the machine and its GPUs have. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Room:
    """Bytes of memory: total, and currently free."""

    total: int
    free: int


def host_memory() -> Room | None:
    """The machine's memory, or the limit of this process's control group. None if unknown."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in ("MemTotal", "MemAvailable"):
                found[name] = int(value.split()[0]) * 1024
    totals, frees = [found.get("MemTotal")], [found.get("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        totals.append(limit)
        frees.append(limit - int((group / "memory.current").read_text()))
    total, free = (min((n for n in numbers if n is not None), default=None) for numbers in (totals, frees))
    return None if total is None or free is None else Room(total, free)


def gpu_memory() -> Room | None:
    """Memory of the smallest GPU that this process can use, from nvidia-smi. None if unknown."""
    command = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    if visible:
        command.append(f"--id={','.join(visible)}")
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        rooms = [Room(*(int(number) * 2**20 for number in line.split(","))) for line in listed.splitlines()]
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return None  # no nvidia-smi, or "[N/A]" on devices that share the host's memory
    return Room(min(r.total for r in rooms), min(r.free for r in rooms)) if rooms else None


def oom_kills() -> int:
    """How many processes the kernel of this machine has killed because memory ran out; 0 if it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0
