"""The parameters of a model by kind, and what a rank holds of them. Needs no torch.

The arithmetic is a twin of what ``parallelize``, FSDP2 and the optimizers do; ``laid_out.py`` asks those themselves.
It is there for what must not import torch (the checks before a start), and for what is asked thousands of times (the
search for a layout). tests/planner/test_state.py holds both against the tensors of real ranks.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torchtitan_style.common.sizes import FP32, local_shape
from torchtitan_style.config import Config
from torchtitan_style.config.layout import Layout
from torchtitan_style.models.registry import model_config, spec_of


@dataclass(frozen=True)
class Kind:
    """Parameters of the same name but for the number of the layer, and of the same shape."""

    name: str
    """As "model.layers.*.mlp.up_proj.weight"."""
    shape: tuple[int, ...]
    count: int
    tp_dim: int | None
    """The dimension that tensor parallelism splits."""
    muon: bool
    """Whether Muon takes them, else AdamW."""

    @property
    def in_block(self) -> bool:
        return "*" in self.name

    def tp_numbers(self, tp: int) -> int:
        """Numbers of one of them on a tensor-parallel rank, as FSDP gathers it."""
        return math.prod(self.shape) // (1 if self.tp_dim is None else tp)

    def local(self, layout: Layout, index: int = 0) -> tuple[int, ...]:
        """What the rank ``index`` of the fsdp ranks holds of one of them."""
        return local_shape(self.shape, tp=layout.tp, tp_dim=self.tp_dim, fsdp=layout.fsdp, index=index)


@dataclass(frozen=True)
class State:
    """Bytes of a rank that are there in every step, whatever the batch."""

    weights: int
    """fp32 master weights."""
    gradients: int
    """Of the weights, in fp32."""
    optimizer: int
    """AdamW's two moments and number of steps, or Muon's one."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def parameter_kinds(config: Config) -> tuple[Kind, ...]:
    """In the order of the layers. A tied head is not one."""
    spec = spec_of(config.model.name)
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for name, shape in spec.parameter_shapes(model_config(config.model)).items():
        counts[re.sub(r"\.layers\.\d+\.", ".layers.*.", name), shape] += 1
    muon = config.optimizer.name == "muon"
    return tuple(
        Kind(
            name=name,
            shape=shape,
            count=count,
            tp_dim=spec.tensor_parallel_dim(name),
            muon=muon and spec.is_hidden_matrix(name, _shaped(shape)),
        )
        for (name, shape), count in counts.items()
    )


def state_of(kinds: tuple[Kind, ...], layout: Layout, index: int = 0) -> State:
    """What the rank ``index`` of the fsdp ranks holds. Rank 0 holds the most of every parameter."""
    weights = optimizer = 0
    for kind in kinds:
        size = kind.count * FP32 * math.prod(kind.local(layout, index))
        weights += size
        optimizer += size if kind.muon else 2 * size + FP32 * kind.count
    return State(weights=weights, gradients=weights, optimizer=optimizer)


def _shaped(shape: tuple[int, ...]) -> Any:
    """What a question about a parameter's shape needs of a tensor."""
    return SimpleNamespace(ndim=len(shape), shape=shape)
