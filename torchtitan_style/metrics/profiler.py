"""Traces of single training steps, for Perfetto or chrome://tracing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from torchtitan_style.config.schema import Profiling


def profile_step(config: Profiling, step: int, *, folder: Path, rank: int) -> AbstractContextManager[object]:
    """Record the step run inside of this context, if it is one of every ``profile_freq``."""
    if not config.enable_profiling or step % config.profile_freq:
        return nullcontext()
    path = folder / config.save_traces_folder / f"step-{step}" / f"rank-{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities, record_shapes=True, on_trace_ready=lambda p: p.export_chrome_trace(str(path)))
