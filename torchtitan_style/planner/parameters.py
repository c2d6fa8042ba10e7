"""The parameters of a model by kind, and what a rank holds of them. Needs no torch.

The arithmetic is a twin of what ``parallelize``, FSDP2 and the optimizers do; ``laid_out.py`` asks those themselves.
It is there for what must not import torch (the checks before a start), and for what is asked thousands of times (the
search for a layout). tests/planner/test_state.py holds both against the tensors of real ranks.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torchtitan_style.common.sizes import FP32, local_shape
from torchtitan_style.config import Config
from torchtitan_style.config.layout import Layout
from torchtitan_style.config.pipeline import Stage
from torchtitan_style.models.registry import model_config, spec_of
from torchtitan_style.models.trained import adapter_shapes, adapter_split, is_adapter, is_frozen, shaped


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
    trained: bool = True
    """Whether they have gradients and optimizer state."""
    saved: bool = True
    """Whether checkpoints hold them."""
    copy: bool = False
    """Whether it is the head's copy of an embedding that another pipeline stage has: without optimizer state."""
    number_bytes: int = FP32
    """Of a number, as a rank keeps it."""

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
    """fp32 master weights, and what LoRA adapts in the type of computation."""
    gradients: int
    """Of the weights that are trained, in fp32."""
    optimizer: int
    """AdamW's two moments and number of steps, or Muon's one."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def parameter_kinds(config: Config, stages: Sequence[Stage] = ()) -> tuple[Kind, ...]:
    """In the order of the layers, adapters last. A tied head is not one, but where the embedding is on another stage.

    stages: of the pipeline, whose parameters are wanted; (): all. What was counted is kept: a search asks thousands of
    times for the same.
    """
    parts = config.model, config.lora, config.training.freeze, config.training.mixed_precision_param
    key = repr((*parts, config.optimizer.name, stages))
    if key not in _COUNTED:
        if len(_COUNTED) == _MOST_COUNTED:
            _COUNTED.clear()
        _COUNTED[key] = _count(config, stages)
    return _COUNTED[key]


_COUNTED: dict[str, tuple[Kind, ...]] = {}
_MOST_COUNTED = 1000


def _count(config: Config, stages: Sequence[Stage]) -> tuple[Kind, ...]:
    spec, shape, lora = spec_of(config.model.name), model_config(config.model), config.lora
    muon = config.optimizer.name == "muon"
    frozen_bytes = FP32 if not lora.rank or config.training.mixed_precision_param == "float32" else FP32 // 2
    counts: Counter[Kind] = Counter()
    for name, size in (spec.parameter_shapes(shape) | adapter_shapes(spec, shape, lora)).items():
        if stages and not _is_on(name, stages):
            continue
        trained = not is_frozen(name, config)
        kind = Kind(
            name=re.sub(r"\.layers\.\d+\.", ".layers.*.", name),
            shape=size,
            count=0,
            tp_dim=adapter_split(name, spec) if is_adapter(name) else spec.tensor_parallel_dim(name),
            muon=muon and trained and spec.is_hidden_matrix(name, shaped(size)),
            trained=trained,
            saved=trained or not lora.rank,
            number_bytes=FP32 if trained else frozen_bytes,
        )
        counts[kind] += 1
    if stages and stages[-1].is_last and shape.tie_word_embeddings:
        size = (shape.vocab_size, shape.hidden_size)
        split = spec.tensor_parallel_dim("lm_head.weight")
        trained = not is_frozen("model.embed_tokens.weight", config)
        kept = FP32 if trained else frozen_bytes
        copy = Kind("lm_head.weight", size, 1, split, False, trained=trained, saved=False, number_bytes=kept, copy=True)
        counts[copy] = 1
    return tuple(dataclasses.replace(kind, count=count) for kind, count in counts.items())


def _is_on(name: str, stages: Sequence[Stage]) -> bool:
    """Whether one of ``stages`` has the parameter."""
    if found := re.search(r"\.layers\.(\d+)\.", name):
        return any(int(found[1]) in stage.blocks for stage in stages)
    return any(stage.is_first if "embed_tokens" in name else stage.is_last for stage in stages)


def state_of(kinds: tuple[Kind, ...], layout: Layout, index: int = 0) -> State:
    """What the rank ``index`` of the fsdp ranks holds. Rank 0 holds the most of every parameter."""
    weights = sum(kind.number_bytes * _held(kind, layout, index) for kind in kinds)
    gradients = sum(FP32 * _held(kind, layout, index) for kind in kinds if kind.trained)
    return State(weights=weights, gradients=gradients, optimizer=_optimizer(kinds, layout, index))


def saved_of(kinds: tuple[Kind, ...], layout: Layout) -> int:
    """Bytes of what the rank that holds most adds to a checkpoint."""
    weights = sum(kind.number_bytes * _held(kind, layout, 0) for kind in kinds if kind.saved)
    return weights + _optimizer(kinds, layout, 0)


def _held(kind: Kind, layout: Layout, index: int) -> int:
    """Numbers of all parameters of this kind on a rank."""
    return kind.count * math.prod(kind.local(layout, index))


def _optimizer(kinds: tuple[Kind, ...], layout: Layout, index: int) -> int:
    """Bytes of AdamW's two moments and numbers of steps, and Muon's momenta."""
    trained = [kind for kind in kinds if kind.trained and not kind.copy]
    moments = sum(FP32 * _held(kind, layout, index) * (1 if kind.muon else 2) for kind in trained)
    return moments + sum(FP32 * kind.count for kind in trained if not kind.muon)
