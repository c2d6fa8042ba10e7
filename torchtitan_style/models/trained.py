"""Which parameters a run trains: all, all but those of ``training.freeze``, or LoRA's adapters. Needs no torch."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

from torchtitan_style.config import Config
from torchtitan_style.config.schema import Lora

from .registry import model_config, spec_of
from .spec import ModelSpec, Shapes

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""Ends of the names of an adapter's two matrices, [rank, in] and [out, rank], as in PEFT."""


def is_adapter(name: str) -> bool:
    """Whether the parameter ``name`` belongs to an adapter."""
    return name.endswith((DOWN, UP))


def adaptable_modules(spec: ModelSpec, shape: Any) -> Shapes:
    """The linear layers that can have adapters, and the shapes [out, in] of their weights: those of attention and dense
    MLPs. Stacked experts and their router are none."""
    return {
        name.removesuffix(".weight"): size
        for name, size in spec.parameter_shapes(shape).items()
        if len(size) == 2 and spec.is_hidden_matrix(name, shaped(size)) and not spec.is_router(name)
    }


def selects(pattern: str, module: str) -> bool:
    """Whether an entry of ``lora.target_modules`` names ``module``."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")


def adapted_modules(spec: ModelSpec, shape: Any, lora: Lora) -> Shapes:
    """The linear layers that have adapters, as ``adaptable_modules``; empty without LoRA."""
    if not lora.rank:
        return {}
    return {
        module: size
        for module, size in adaptable_modules(spec, shape).items()
        if any(selects(pattern, module) for pattern in lora.target_modules)
    }


def adapter_shapes(spec: ModelSpec, shape: Any, lora: Lora) -> Shapes:
    """Names and shapes of the adapters' parameters."""
    found: Shapes = {}
    for module, (rows, columns) in adapted_modules(spec, shape, lora).items():
        found |= {module + DOWN: (lora.rank, columns), module + UP: (rows, lora.rank)}
    return found


def adapter_split(name: str, spec: ModelSpec) -> int | None:
    """The dimension of an adapter's parameter that tensor parallelism splits: the one that the adapted matrix has as
    well, if it is split there."""
    dim = 1 if name.endswith(DOWN) else 0
    module = name.removesuffix(DOWN).removesuffix(UP)
    return dim if spec.tensor_parallel_dim(f"{module}.weight") == dim else None


def is_frozen(name: str, config: Config) -> bool:
    """Whether the parameter ``name`` stays as it is."""
    if config.lora.rank:
        return not is_adapter(name)
    return any(fnmatchcase(name, pattern) for pattern in config.training.freeze)


def trained_shapes(config: Config) -> Shapes:
    """Names and shapes of the parameters that are trained."""
    spec, shape = spec_of(config.model.name), model_config(config.model)
    every = spec.parameter_shapes(shape) | adapter_shapes(spec, shape, config.lora)
    return {name: size for name, size in every.items() if not is_frozen(name, config)}


def flops_per_token(config: Config) -> float:
    """Floating-point operations to train on one token: as ``ModelConfig.flops_per_token``, but for what frozen weights
    save. They have no gradients (2 of 6 for each weight), and those below the first that is trained pass none on (2
    more)."""
    spec, shape = spec_of(config.model.name), model_config(config.model)
    total, passes_on = float(shape.flops_per_token(config.training.seq_len)), False
    if not config.lora.rank and not config.training.freeze:
        return total
    adapted, trained = adapted_modules(spec, shape, config.lora), trained_shapes(config)
    for name, size in spec.parameter_shapes(shape).items():
        passes_on = passes_on or name in trained or name.removesuffix(".weight") in adapted
        is_embedding = "embed_tokens" in name
        if name in trained or len(size) < 2 or (is_embedding and not shape.tie_word_embeddings):
            continue
        active = shape.num_experts_per_tok / shape.num_experts if len(size) == 3 else 1.0
        total -= (2 if passes_on or is_embedding else 4) * active * math.prod(size)  # a tied one is the head
    return total + 6 * sum(math.prod(size) for name, size in trained.items() if is_adapter(name))


def shaped(shape: tuple[int, ...]) -> Any:
    """What a question about a parameter's shape needs of a tensor."""
    return SimpleNamespace(ndim=len(shape), shape=shape)
