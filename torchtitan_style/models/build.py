"""The one way to a model on its devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .spec import ModelSpec


def build_model(
    spec: ModelSpec,
    config: Any,
    *,
    device: torch.device,
    fill: Callable[[Any], None],
    lay_out: Callable[[Any], None] = lambda model: None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A model of ``config`` on ``device``, in memory for this rank's part of it only.

    lay_out: shards it, while it has no data yet. fill: draws or reads its weights, in place. dtype: of the parameters.
    """
    with torch.device("meta"):
        model = spec.build(config)
    model.to(dtype)
    lay_out(model)
    model.to_empty(device=device)
    model.tie_weights()  # to_empty may have given each module a parameter of its own
    with torch.no_grad():
        fill(model)
    return model
