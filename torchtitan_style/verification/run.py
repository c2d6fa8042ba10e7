"""Compare a training layout with one process: choose what fits this machine, compute the reference, start the ranks."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from torchtitan_style.common.device import available_memory, name, peak_flops
from torchtitan_style.config import Config, to_toml
from torchtitan_style.config.layout import plan_batch, plan_layout
from torchtitan_style.models.registry import model_config
from torchtitan_style.models.spec import describe_size

from .layout import reference
from .report import Check
from .scale import for_verification

_SECONDS = 100
"""Time that computing may take at the peak rate of this machine; larger models are verified on a small copy."""


def compare_layout(
    config: Config, world_size: int, *, on_gpus: bool, start: Callable[[Path], None], say: Callable[[str], None]
) -> dict[str, list[Check]]:
    """What was compared, by the precision that the ranks computed in.

    start: runs the ranks on the configuration and the reference in a folder, where rank 0 leaves ``checks.json``; see
    ``commands/verify_rank.py``. say: told what is compared.
    """
    layout = plan_layout(config.parallelism, world_size)
    device = torch.device("cuda" if on_gpus else "cpu")
    flops = _SECONDS * (peak_flops(device, torch.float32) or 1e13)
    alone = int(0.7 * available_memory(device))  # the reference is on one GPU
    memory = alone * world_size if on_gpus else alone
    small, notes = for_verification(config, layout, memory=memory, alone=alone, flops=flops)
    plan = plan_batch(small.training, layout.dp)
    microbatches = f" in {plan.accumulation_steps} microbatches" if plan.accumulation_steps > 1 else ""
    what = (
        f"{world_size} process{'es' if world_size > 1 else ''} ({layout}) on {name(device)}, against one in fp32: "
        f"{describe_size(model_config(small.model))}, {plan.global_batch_size} rows of "
        f"{small.training.seq_len} tokens{microbatches}"
    )
    say("\n  ".join([what, *notes]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.toml").write_text(to_toml(small), encoding="utf-8")
        reference(small, folder, device=device, rows=plan.global_batch_size)
        if on_gpus:
            torch.cuda.empty_cache()  # the ranks need it
        start(folder)
        found = json.loads((folder / "checks.json").read_text(encoding="utf-8"))
    return {precision: [Check(**check) for check in checks] for precision, checks in found.items()}
