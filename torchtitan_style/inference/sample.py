"""Text sampled from a model while it trains.

Every step runs the whole text so far through the model: no cache, so that it works in every layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtitan_style.config.schema import Generation

__all__ = ["pick_token", "sample"]


@torch.no_grad()
def sample(
    model: Callable[[Tensor], Tensor],
    prompt: list[int],
    config: Generation,
    *,
    end_of_text: int,
    max_length: int,
    multiple_of: int,
    seed: int,
    device: torch.device,
) -> list[int]:
    """Token ids that continue ``prompt``, up to end-of-text. Called by all ranks, the same on all.

    model: token ids [1, T] → logits [1, T, V]. max_length: positions the model has. multiple_of: T
    must be a multiple of it (tensor parallelism splits the positions); padding comes last, where a
    causal model does not see it.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(config.max_new_tokens):
        if len(ids) >= max_length:
            break
        length = -(-len(ids) // multiple_of) * multiple_of
        padded = torch.tensor([ids + [end_of_text] * (length - len(ids))], device=device)
        logits = model(padded)
        if isinstance(logits, DTensor):
            logits = logits.full_tensor()
        token = torch.tensor(
            pick_token(
                logits[0, len(ids) - 1].float().cpu(),
                temperature=config.temperature,
                top_k=config.top_k,
                generator=generator,
            ),
            device=device,
        )
        dist.broadcast(token, src=0)  # ranks must not part ways over a rounding error
        if token.item() == end_of_text:
            break
        ids.append(int(token.item()))
    return ids[len(prompt) :]


def pick_token(logits: Tensor, *, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Draw a token id from softmax(logits / temperature) over the ``top_k`` likeliest (0: all).

    logits: [V], fp32. Temperature 0 takes the likeliest.
    """
    if temperature == 0.0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        threshold = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
