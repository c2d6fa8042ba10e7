"""Which token comes next: logits → filters → a draw.

The filters are applied in the order of Transformers: repetition penalty, temperature, top-k, top-p, min-p.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from torchtitan_style.common.errors import UserError

from .settings import Sampling

_CANDIDATES = 1024
"""The likeliest tokens that top-p looks at first; sorting the whole vocabulary takes longer than a small model."""


def filter_logits(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Logits [B, V] with what must not be drawn at -inf. The softmax of it are the probabilities, temperature > 0.

    logits: fp32. seen: [B, V] booleans, the tokens that are in each row's text; used by the repetition penalty.
    """
    if sampling.repetition_penalty != 1.0 and seen is not None:
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0.0:
        return logits
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1.0:
        logits = _top_p(logits, sampling.top_p, among=sampling.top_k)
    if sampling.min_p > 0.0:
        least = logits.max(dim=-1, keepdim=True).values + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


def _top_p(logits: Tensor, top_p: float, *, among: int) -> Tensor:
    """among: how many tokens are left in each row, or 0 for all; equally likely ones may make it some more."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    for count in (min(_CANDIDATES, logits.shape[-1]), logits.shape[-1]):
        values, tokens = logits.topk(count)  # the likeliest first
        probabilities = (values - total).exp()
        before = probabilities.cumsum(dim=-1) - probabilities
        dropped = before >= top_p
        dropped[:, 0] = False
        # Else the nucleus may go on beyond the candidates. To look is to wait for a GPU.
        if (logits.is_cuda and 0 < 2 * among <= count) or dropped[:, -1].all():
            break
    kept = values.masked_fill(dropped, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, tokens, kept)


class Sampler:
    """Draws a token for each row of a batch. A row's draws depend on its own seed alone, not on the other rows.

    seeds: one per row. prompts: each row's token ids so far; for the repetition penalty.
    """

    def __init__(
        self, sampling: Sampling, *, seeds: Sequence[int | str], prompts: Sequence[Sequence[int]] = ()
    ) -> None:
        sampling.check()
        self.sampling = sampling
        self._draws = [random.Random(seed) for seed in seeds]
        self._prompts = prompts
        self._seen: Tensor | None = None

    def pick(self, logits: Tensor) -> list[int]:
        """A token for each row of logits [B, V]. A waiting point: the numbers come to the CPU."""
        logits = logits.float()
        if torch.are_deterministic_algorithms_enabled():
            logits = logits.cpu()  # CUDA has no sums in order
        sampling = self.sampling
        if sampling.repetition_penalty != 1.0 and self._seen is None:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, prompt in enumerate(self._prompts):
                self._seen[row, list(prompt)] = True
        logits = filter_logits(logits, sampling, self._seen)
        highest, tokens = logits.max(dim=-1)  # of several the first; a third of argmax's time on CPU
        if sampling.temperature > 0.0:
            # With a NaN or an infinity the search ends past the last token.
            tokens = _draw(logits, highest, [draw.random() for draw in self._draws]).clamp(max=logits.shape[-1] - 1)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        picked, finite = torch.stack((tokens, highest.isfinite())).tolist()  # together, as a GPU is waited for here
        if not all(finite):
            raise UserError(
                "the model's logits contain NaN or infinity: its weights are damaged or exceed the range of --dtype, "
                "or the temperature or the repetition penalty is too small"
            )
        return list(picked)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self._draws = [self._draws[row] for row in rows]
        if self._seen is not None:
            self._seen = self._seen[rows]


def _draw(logits: Tensor, highest: Tensor, uniform: list[float]) -> Tensor:
    """The tokens [B] at which the distribution function of softmax(logits) first exceeds ``uniform``, in [0, 1).

    highest: of each row of logits."""
    weights = (logits - highest[:, None]).exp()
    # Ten thousand small numbers are added up: in fp32 the last ones would be lost.
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    drawn = torch.tensor(uniform, dtype=torch.float64).to(logits.device, non_blocking=True)
    at = drawn[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True)[:, 0]
