"""Text sampled from a model while it trains, in the layout that it trains in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from torchtitan_style.config.schema import Generation

from .cache import KVCache
from .sampling import Sampler
from .settings import Sampling


@torch.no_grad()
def sample(
    model: Any,
    prompt: list[int],
    config: Generation,
    *,
    end_of_text: int,
    max_length: int,
    windows: list[int | None],
    multiple_of: int,
    seed: int,
    device: torch.device,
    source: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> list[int]:
    """Token ids that continue ``prompt``, up to end-of-text. Called by all ranks, the same on all.

    model: token ids [1, T] → logits [1, T, V], or None on ranks that need not know them. source: a rank that does,
    whose choice counts. max_length: positions the model has. windows: of its layers.
    multiple_of: T must be a multiple of it (tensor parallelism splits the positions). If it is above 1 there is no
    cache: the whole text so far goes through the model, with padding last, where a causal model does not see it.
    advance: called after each token.
    """
    sampler = Sampler(Sampling(temperature=config.temperature, top_k=config.top_k), seeds=[seed], prompts=[prompt])
    cache = KVCache(windows, capacity=len(prompt) + config.max_new_tokens) if multiple_of == 1 else None
    ids = list(prompt)
    for _ in range(config.max_new_tokens):
        if len(ids) >= max_length:
            break
        if cache is not None:
            new = torch.tensor([ids[cache.length :]], device=device)
            logits = model(new, positions=cache.positions(new), cache=cache)
            cache.advance(new.shape[1])
        else:
            length = -(-len(ids) // multiple_of) * multiple_of
            logits = model(torch.tensor([ids + [end_of_text] * (length - len(ids))], device=device))
            if isinstance(logits, DTensor):
                logits = logits.full_tensor()
            logits = None if logits is None else logits[:, : len(ids)]
        token = torch.tensor([-1] if logits is None else sampler.pick(logits[:, -1]), device=device)
        dist.broadcast(token, src=source)  # ranks must not part ways over a rounding error
        if token.item() == end_of_text:
            break
        ids.append(int(token.item()))
        advance()
    return ids[len(prompt) :]
