"""A sample of text from the model that is being trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchtitan_style.config import Config
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer
from torchtitan_style.distributed.pipeline import PipelinedModel
from torchtitan_style.distributed.sharding import kept_gathered
from torchtitan_style.distributed.world import World
from torchtitan_style.inference.sample import sample
from torchtitan_style.models.registry import model_config

from .step import evaluating, mix, whole_rows


def continue_prompt(
    model: Any,
    config: Config,
    world: World,
    tokenizer: Tokenizer,
    *,
    step: int,
    record_progress: Callable[[], None],
) -> str:
    """Text that follows ``config.sample_prompt``, as ``[generation]`` says; the draws depend on the seed and ``step``.

    Called by all ranks. record_progress: called after each token.
    """
    prompt = tokenizer.encode(config.sample_prompt) or [tokenizer.end_of_text]
    shape = model_config(config.model)
    # Every token is a pass over all weights.
    with evaluating(model), whole_rows(model), kept_gathered(model, world.device):
        ids = sample(
            model,
            prompt,
            config.generation,
            end_of_text=tokenizer.end_of_text,
            max_length=shape.max_position_embeddings,
            windows=shape.windows,
            multiple_of=world.layout.tp,
            seed=mix(config.training.seed, step),
            device=world.device,
            source=model.source if isinstance(model, PipelinedModel) else 0,
            advance=record_progress,
        )
    return tokenizer.decode(prompt + ids)[len(config.sample_prompt) :]
