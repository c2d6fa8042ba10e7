"""The share of the full learning rate that each update has: warm-up, stable, decay.

``Optimizers`` multiplies it with the rates of its groups. Steps that are skipped are no updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torchtitan_style.common.extensions import SCHEDULES
from torchtitan_style.config.schema import LRScheduler


def lr_factor(update: int, config: LRScheduler, *, total_steps: int) -> float:
    """Share of the full learning rate at ``update`` (from 1).

    Rises linearly over ``warmup_steps``, stays at 1, and falls over the last ``decay_ratio`` of all
    steps to ``min_lr_factor``. It would reach that one step past the end, so that no step is wasted
    on a rate of zero. Past the end it stays there, however long the warm-up was to be.
    """
    total = config.total_steps or total_steps
    warmup = config.warmup(total_steps)
    if update > total and config.decay_ratio != 0:
        return config.min_lr_factor
    if update <= warmup:
        return update / (warmup + 1)
    decay = total - warmup if config.decay_ratio is None else round(total * config.decay_ratio)
    decay = min(decay, total - warmup)
    start = total - decay
    if update <= start or decay <= 0:
        return 1.0
    progress = (update - start) / (decay + 1)  # in (0, 1)
    shape = _SHAPES.get(config.decay_type) or SCHEDULES.get(config.decay_type)
    return config.min_lr_factor + (1.0 - config.min_lr_factor) * shape(progress)


_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
