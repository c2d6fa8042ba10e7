"""How a model is shared out over pipeline stages. Needs no torch."""

from __future__ import annotations

import math
import re
from typing import Any

from torchtitan_style.config.pipeline import Cost, Stage, make_stages, rank_of_stage
from torchtitan_style.config.schema import Config

from .registry import model_config, spec_of
from .spec import ModelSpec

_MOMENTS = 2
"""Numbers of optimizer state for each weight."""


def stages_of(config: Config) -> tuple[Stage, ...]:
    """All stages of the pipeline that ``config`` asks for, first to last; one if it asks for none."""
    spec, shape = spec_of(config.model.name), model_config(config.model)
    embedding, blocks, head = part_costs(spec, shape, seq_len=config.training.seq_len)
    return make_stages(blocks, embedding=embedding, head=head, parallelism=config.parallelism)


def stages_of_ranks(config: Config) -> list[tuple[Stage, ...]]:
    """Those that each rank of the pp axis runs."""
    pp, schedule = config.parallelism.pipeline_parallel_degree, config.parallelism.pipeline_parallel_schedule
    stages = stages_of(config)
    return [tuple(s for s in stages if rank_of_stage(s.index, pp=pp, schedule=schedule) == rank) for rank in range(pp)]


def part_costs(spec: ModelSpec, shape: Any, *, seq_len: int) -> tuple[Cost, list[Cost], Cost]:
    """What the embedding, each block, and the head cost. Looking up an embedding takes no time worth counting."""
    sizes = [0] * shape.num_hidden_layers
    matrices = [0.0] * shape.num_hidden_layers
    """Weights that a token is multiplied with: of experts, only the chosen ones."""
    for name, numbers in spec.parameter_shapes(shape).items():
        if found := re.search(r"\.layers\.(\d+)\.", f".{name}"):
            sizes[int(found[1])] += math.prod(numbers)
            share = shape.num_experts_per_tok / shape.num_experts if spec.is_expert(name) else 1
            matrices[int(found[1])] += share * math.prod(numbers) if len(numbers) > 1 else 0
    per_position = 12 * shape.num_attention_heads * shape.head_dim
    spans = [min(seq_len, window or seq_len) for window in shape.windows]
    blocks = [
        Cost(time=6 * matrix + per_position * span, state=(1 + _MOMENTS) * size)
        for size, matrix, span in zip(sizes, matrices, spans, strict=True)
    ]
    vocabulary = shape.vocab_size * shape.hidden_size
    # The last stage's copy of a tied embedding has no optimizer state: the first stage sends it the weights.
    copies = 1 if shape.tie_word_embeddings else 1 + _MOMENTS
    return (
        Cost(time=0, state=(1 + _MOMENTS) * vocabulary),
        blocks,
        Cost(time=6 * vocabulary, state=copies * vocabulary),
    )
