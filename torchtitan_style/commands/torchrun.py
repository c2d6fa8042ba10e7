"""Starting the ranks of this host."""

from __future__ import annotations

import os
import subprocess
import sys

__all__ = ["count_gpus", "start_ranks"]


def count_gpus() -> int:
    """GPUs that a process here can use, without the seconds that importing torch takes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() and part.strip() != "-1"])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def start_ranks(options: list[str], module: str, arguments: list[str], *, nproc: int, on_gpus: bool) -> None:
    """Run ``nproc`` processes of ``python -m module arguments`` under torchrun, and wait for them.

    options: torchrun's, for the rendezvous. torchrun is kept quiet about what the ranks have said
    themselves. If one fails this exits: with status 2 for a mistake of the user's, else 1.
    """
    if not on_gpus:
        # Left alone each process would take all cores, and torchrun would give each a single one.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    sys.stdout.flush()

    import logging

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    try:
        run.main([*options, f"--nproc-per-node={nproc}", "-m", module, *arguments])
    except SignalException as signal:
        raise SystemExit(128 + signal.sigval) from None
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if 2 in codes.values():
            raise SystemExit(2) from None
        rank, failure = error.get_first_failure()
        print(f"error: rank {rank} ended with {failure.exitcode}; its own output says why", file=sys.stderr)
        raise SystemExit(1) from None
