"""What is wrong between the [model] section and the rest of a configuration. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torchtitan_style.config.checks import Problem
from torchtitan_style.config.pipeline import num_stages
from torchtitan_style.config.schema import Config, Lora

from .spec import ModelSpec
from .trained import adaptable_modules, selects


def model_problems(config: Config, spec: ModelSpec) -> Iterator[Problem]:
    """Everything that is wrong with the shape of the model, by itself and with rows, ranks and tokenizer."""
    names = [field.name for field in dataclasses.fields(spec.config_class)]
    given = {name: value for name, value in config.model if name in names and value is not None}
    values = dataclasses.asdict(spec.flavors[config.model.flavor]) | given

    def keys(*fields: str) -> tuple[str, ...]:
        """The settings that decide ``fields``: what is not overridden is the flavor's."""
        flavor = () if given.keys() >= set(fields) else ("model.flavor",)
        return (*(f"model.{name}" for name in fields), *flavor)

    # A shape that contradicts itself cannot be constructed, so its fields are judged one by one.
    shape: Any = object.__new__(spec.config_class)
    shape.__dict__.update(values)
    impossible = shape.problems()
    for fields, text in impossible:
        yield Problem(keys(*fields), text)
    if config.lora.rank and not impossible:
        yield from _targets(config.lora, spec, shape)

    tp = config.parallelism.tensor_parallel_degree
    for name, what in spec.tensor_parallel:
        if values[name] > 0 and values[name] % tp:
            yield Problem(
                ("parallelism.tensor_parallel_degree", *keys(name)),
                f"{tp} ranks cannot share the {values[name]} {what} (model.{name}) evenly",
            )
    if config.parallelism.context_parallel_degree > 1 and not spec.context_parallel:
        yield Problem(
            ("parallelism.context_parallel_degree", "model.name"),
            f"{spec.name} models cannot share the positions of a row (ModelSpec.context_parallel)",
        )
    ep = config.parallelism.expert_parallel_degree
    if ep > 1 and not spec.expert_parallel:
        yield Problem(("parallelism.expert_parallel_degree", "model.name"), f"{spec.name} models have no experts")
    for name, what in spec.expert_parallel:
        if values[name] > 0 and values[name] % ep:
            yield Problem(
                ("parallelism.expert_parallel_degree", *keys(name)),
                f"{ep} ranks cannot share the {values[name]} {what} (model.{name}) evenly",
            )
    yield from _pipeline(config, spec, values["num_hidden_layers"], keys("num_hidden_layers"))
    seq_len = config.training.seq_len
    if 0 < values["max_position_embeddings"] < seq_len:
        yield Problem(
            ("training.seq_len", *keys("max_position_embeddings")),
            f"{seq_len} exceeds model.max_position_embeddings = {values['max_position_embeddings']}",
        )
    # 256 bytes, Qwen3's 26 special tokens, and one merge, so that there is something to train.
    if config.data.tokenizer == "train" and 0 < values["vocab_size"] < 283:
        yield Problem(
            (*keys("vocab_size"), "data.tokenizer"),
            f"a byte-level tokenizer with Qwen3's special tokens needs at least 283 tokens, not {values['vocab_size']}",
        )


def _pipeline(config: Config, spec: ModelSpec, layers: int, keys: tuple[str, ...]) -> Iterator[Problem]:
    """What is wrong with sharing out ``layers`` blocks over the stages of a pipeline. keys: that decide ``layers``."""
    parallelism = config.parallelism
    pp, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    if pp == 1 or layers < 1:
        return
    if not spec.pipeline:
        yield Problem(
            ("parallelism.pipeline_parallel_degree", "model.name"),
            f"{spec.name} models cannot be split into pipeline stages: set it to 1",
        )
        return
    stages, chosen = num_stages(parallelism), parallelism.pipeline_parallel_blocks
    named = f"{stages} stages ({pp} ranks, {schedule})"
    # The first stage may have the embedding alone, the last the head; those between need a block.
    if stages - 2 > layers:
        most = (layers + 2) // (stages // pp)
        yield Problem(
            ("parallelism.pipeline_parallel_degree", "parallelism.pipeline_parallel_schedule", *keys),
            f"{layers} blocks cannot be divided among {named}: use at most {most} ranks",
        )
    elif chosen and (len(chosen) != stages or sum(chosen) != layers or 0 in chosen[1:-1]):
        yield Problem(
            ("parallelism.pipeline_parallel_blocks", "parallelism.pipeline_parallel_degree", *keys),
            f"{chosen} are {len(chosen)} stages with {sum(chosen)} blocks; there must be {named} with {layers} blocks "
            "in all, and at least one in each stage between the first and the last",
        )


def _targets(lora: Lora, spec: ModelSpec, shape: Any) -> Iterator[Problem]:
    """Entries of lora.target_modules that name nothing that can be adapted."""
    modules = adaptable_modules(spec, shape)
    kinds = ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    for pattern in lora.target_modules:
        if not any(selects(pattern, module) for module in modules):
            experts = "; experts and their router cannot be adapted" if spec.expert_parallel else ""
            yield Problem(
                ("lora.target_modules",),
                f'"{pattern}" names no linear layer of attention or MLP: there are {kinds}{experts}',
            )
