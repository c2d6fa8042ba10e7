"""What a rank holds, asked of the functions that training uses: the model is built without memory and laid out over a
process group of N ranks that exists in name only.

Takes seconds for 1,024 ranks and 32 B parameters. Only where this process is in no process group yet.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtitan_style.common.sizes import FP32
from torchtitan_style.config import Config
from torchtitan_style.config.layout import Layout
from torchtitan_style.config.pipeline import Stage
from torchtitan_style.distributed.experts import ExpertMesh, expert_mesh
from torchtitan_style.distributed.pipeline import keep_stage
from torchtitan_style.distributed.world import World, destroy_world, init_world
from torchtitan_style.models.lora import add_adapters
from torchtitan_style.models.registry import model_config, spec_of
from torchtitan_style.models.stages import stages_of_ranks
from torchtitan_style.models.trained import adapted_modules
from torchtitan_style.train.step import DTYPES, freeze

from .parameters import State


@dataclass(frozen=True)
class Held:
    """One parameter on one rank."""

    shape: tuple[int, ...]
    """Of the whole."""
    local: tuple[int, ...]
    """Of this rank's part."""
    placements: tuple[str, ...]
    """How it is spread over the axes of its mesh, as "dp_shard: Shard(0)"; empty: it is whole."""
    muon: bool
    normuon: bool
    trained: bool
    number_bytes: int
    copy: bool
    """Whether it is a tied head's copy of the embedding of another pipeline stage."""


@contextlib.contextmanager
def fake_world(layout: Layout, rank: int = 0) -> Iterator[World]:
    """The world as ``rank`` of ``layout`` sees it. Nothing that is sent arrives."""
    assert not dist.is_initialized(), "the fake process group is one for the whole process"
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        yield init_world(layout, timeout_seconds=60)
    finally:
        destroy_world()


def lay_out(config: Config, layout: Layout, rank: int = 0) -> dict[str, Held]:
    """The parameters that ``rank`` holds, by name."""
    spec, shape = spec_of(config.model.name), model_config(config.model)
    dtype = DTYPES[config.training.mixed_precision_param]
    adapted = adapted_modules(spec, shape, config.lora)
    muon, normuon = config.optimizer.name == "muon", config.optimizer.muon.normuon_beta2 > 0

    def build(world: World, stage: Stage | None, experts: ExpertMesh | None) -> dict[str, Held]:
        with torch.device("meta"):
            model = spec.build(shape).to(dtype if adapted else torch.float32)
        if stage is not None:
            keep_stage(model, stage)
        freeze(model, config)
        spec.parallelize(
            model,
            world.mesh,
            activation_checkpoint=config.activation_checkpoint,
            compile=config.compile.model_copy(update={"enable": False}),  # it changes no parameter
            param_dtype=dtype,
            reduce_dtype=torch.float32,
            reshard_after_forward=True,
            **({"expert_mesh": experts} if spec.expert_parallel else {}),
            **({"adapt": lambda model: add_adapters(model, config.lora, adapted)} if adapted else {}),
        )
        return {
            name: _held(
                parameter,
                muon=muon and parameter.requires_grad and spec.is_hidden_matrix(name, parameter),
                normuon=normuon,
                copy=stage is not None and shape.tie_word_embeddings and name == "lm_head.weight",
            )
            for name, parameter in model.named_parameters()
        }

    with fake_world(layout, rank) as world:
        experts = expert_mesh(world) if spec.expert_parallel else None
        found: dict[str, Held] = {}
        for stage in stages_of_ranks(config)[world.stage] if layout.pp > 1 else [None]:
            found |= build(world, stage, experts)
        return found


def state_held(held: dict[str, Held]) -> State:
    """Bytes of weights, gradients and optimizer state."""
    weights = sum(each.number_bytes * math.prod(each.local) for each in held.values())
    trained = [each for each in held.values() if each.trained]
    gradients = sum(FP32 * math.prod(each.local) for each in trained)
    trained = [each for each in trained if not each.copy]
    moments = 2 * sum(FP32 * math.prod(each.local) for each in trained)
    muon = sum(FP32 * math.prod(each.local) for each in trained if each.muon)
    rows = sum(FP32 * math.prod(each.local[:-1]) for each in trained if each.normuon)
    steps = FP32 * sum(not each.muon for each in trained)
    return State(weights=weights, gradients=gradients, optimizer=moments - muon + rows + steps)


def _held(parameter: Any, *, muon: bool, normuon: bool, copy: bool) -> Held:
    shape = tuple(parameter.shape)
    kept = muon, muon and normuon, parameter.requires_grad, parameter.element_size(), copy
    if not isinstance(parameter, DTensor):
        return Held(shape, shape, (), *kept)
    names = parameter.device_mesh.mesh_dim_names or ()
    placements = tuple(f"{name}: {_short(p)}" for name, p in zip(names, parameter.placements, strict=True))
    return Held(shape, tuple(parameter.to_local().shape), placements, *kept)


def _short(placement: Any) -> str:
    if placement.is_replicate():
        return "whole"
    return f"dim {placement.dim}"
