"""Model families by name: what the rest of the program needs to know of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchtitan_style.models.qwen3.model import Qwen3ForCausalLM
from torchtitan_style.models.qwen3.parallelize import parallelize_qwen3

__all__ = ["MODELS", "ModelFamily"]


@dataclass(frozen=True)
class ModelFamily:
    """How to build a model of this family from its config, and how to lay it out over a mesh."""

    build: Callable[[Any], Any]
    """Config → module that maps (token ids, labels) to (sum of token losses, right guesses); has
    ``initial_std`` and ``tie_weights``."""
    parallelize: Callable[..., None]
    """Lays the module out over a mesh, in place; see ``parallelize_qwen3``."""


MODELS = {"qwen3": ModelFamily(build=Qwen3ForCausalLM, parallelize=parallelize_qwen3)}
