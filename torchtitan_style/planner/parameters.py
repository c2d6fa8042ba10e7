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

from torchtitan_style.common.sizes import FP32, expert_shard_dim, local_shape
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
    normuon: bool = False
    """Whether Muon keeps a number for each of their rows."""
    trained: bool = True
    """Whether they have gradients and optimizer state."""
    saved: bool = True
    """Whether checkpoints hold them."""
    copy: bool = False
    """Whether it is the head's copy of an embedding that another pipeline stage has: without optimizer state."""
    number_bytes: int = FP32
    """Of a number, as a rank keeps it."""
    expert: bool = False
    """Whether it is a stack of the experts of a layer."""
    matrices: int = 1
    """Of a stack, how many matrices it is made of."""

    @property
    def in_block(self) -> bool:
        return "*" in self.name

    @property
    def is_block_matrix(self) -> bool:
        """Whether it is multiplied with in a block; adapters are not counted."""
        return self.in_block and len(self.shape) > 1 and not is_adapter(self.name)

    def gathered(self, layout: Layout) -> int:
        """Numbers of one of them as FSDP gathers it."""
        if self.expert:
            return math.prod(self.shape) // layout.ep
        return math.prod(self.shape) // (1 if self.tp_dim is None else layout.tp)

    def shards(self, layout: Layout) -> int:
        """Ranks that FSDP shards it over."""
        return layout.fsdp // layout.ep * layout.tp if self.expert else layout.fsdp

    def shard_dim(self, layout: Layout) -> int:
        """The dimension that FSDP cuts."""
        return expert_shard_dim(self.shape, ep=layout.ep, shards=self.shards(layout)) if self.expert else 0

    def is_exchanged(self, layout: Layout) -> bool:
        """Whether Muon has one rank make each of them orthogonal: not those that each rank has whole matrices of."""
        return layout.world_size > layout.pp and (self.matrices == 1 or self.shard_dim(layout) > 0)

    def local(self, layout: Layout, rank: int = 0) -> tuple[int, ...]:
        """What ``rank`` holds of one of them."""
        shards, dim = self.shards(layout), self.shard_dim(layout)
        if not self.expert:
            index = rank // layout.tp % layout.fsdp
            return local_shape(self.shape, tp=layout.tp, tp_dim=self.tp_dim, fsdp=shards, index=index)
        # Axes of experts, innermost last: … × (what ep leaves of fsdp) × ep × tp; see distributed/experts.py.
        index = rank // (layout.ep * layout.tp) * layout.tp + rank % layout.tp
        return local_shape(self.shape, tp=layout.ep, tp_dim=0, fsdp=shards, fsdp_dim=dim, index=index % shards)


@dataclass(frozen=True)
class State:
    """Bytes of a rank that are there in every step, whatever the batch."""

    weights: int
    """fp32 master weights, and what LoRA adapts in the type of computation."""
    gradients: int
    """Of the weights that are trained, in fp32."""
    optimizer: int
    """AdamW's two moments and number of steps, or Muon's one moment, and NorMuon's number for each row."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def parameter_kinds(config: Config, stages: Sequence[Stage] = ()) -> tuple[Kind, ...]:
    """In the order of the layers, adapters last. A tied head is not one, but where the embedding is on another stage.

    stages: of the pipeline, whose parameters are wanted; (): all. What was counted is kept: a search asks thousands of
    times for the same.
    """
    parts = config.model, config.lora, config.training.freeze, config.training.mixed_precision_param
    key = repr((*parts, config.optimizer.name, config.optimizer.muon.normuon_beta2, stages))
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
        in_muon = muon and trained and spec.is_hidden_matrix(name, shaped(size))
        kind = Kind(
            name=re.sub(r"\.layers\.\d+\.", ".layers.*.", name),
            shape=size,
            count=0,
            tp_dim=adapter_split(name, spec) if is_adapter(name) else spec.tensor_parallel_dim(name),
            muon=in_muon,
            normuon=in_muon and config.optimizer.muon.normuon_beta2 > 0,
            trained=trained,
            saved=trained or not lora.rank,
            number_bytes=FP32 if trained else frozen_bytes,
            expert=spec.is_expert(name),
            matrices=math.prod(size[:-1]) // (spec.stacked_rows(name, size) or math.prod(size[:-1])),
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


def state_of(kinds: tuple[Kind, ...], layout: Layout, rank: int = 0) -> State:
    """What ``rank`` holds. Rank 0 holds the most of every parameter."""
    weights = sum(kind.number_bytes * _held(kind, layout, rank) for kind in kinds)
    gradients = sum(FP32 * _held(kind, layout, rank) for kind in kinds if kind.trained)
    return State(weights=weights, gradients=gradients, optimizer=_optimizer(kinds, layout, rank))


def saved_of(kinds: tuple[Kind, ...], layout: Layout) -> int:
    """Bytes of what the rank that holds most adds to a checkpoint."""
    weights = sum(kind.number_bytes * _held(kind, layout, 0) for kind in kinds if kind.saved)
    return weights + _optimizer(kinds, layout, 0)


def _held(kind: Kind, layout: Layout, rank: int) -> int:
    """Numbers of all parameters of this kind on a rank."""
    return kind.count * math.prod(kind.local(layout, rank))


def _optimizer(kinds: tuple[Kind, ...], layout: Layout, rank: int) -> int:
    """Bytes of AdamW's two moments and numbers of steps, and Muon's momenta and numbers of rows."""
    trained = [kind for kind in kinds if kind.trained and not kind.copy]
    moments = sum(FP32 * _held(kind, layout, rank) * (1 if kind.muon else 2) for kind in trained)
    steps = sum(FP32 * kind.count for kind in trained if not kind.muon)
    rows = sum(FP32 * kind.count * math.prod(kind.local(layout, rank)[:-1]) for kind in trained if kind.normuon)
    return moments + steps + rows
