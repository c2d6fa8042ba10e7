"""Prompts in, tokens out, one step at a time.

Prefill runs the prompts through the model and fills the cache, decode adds one token per row and step.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .cache import KVCache
from .sampling import Sampler
from .step import DecodingStep

_PREFILL = 1024
"""Positions of a row that go through the model at once: the memory that they take is bounded, and Ctrl-C is heard."""


@dataclass
class Speed:
    """Tokens and seconds: of prompts going in, up to each row's first new token, and of all later ones."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def __iadd__(self, other: Speed) -> Speed:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

    def __str__(self) -> str:
        return (
            f"prefill {self.prefill_tokens:,} tokens at {self.prefill:,.0f} tokens/s; "
            f"decode {self.decode_tokens:,} tokens at {self.decode:,.1f} tokens/s"
        )

    @property
    def prefill(self) -> float:
        """Tokens per second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode(self) -> float:
        """Tokens per second, all rows together."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Decoder:
    """Rows of token ids that are continued together.

    model: (ids [B, T], positions=, cache=) → logits [B, 1, V]. prompts: token ids, none empty. cache: made for them,
    empty or, for a single prompt, with what is before it. copies: rows that continue each prompt, which is prefilled
    once. step: takes the model's place for one more token, for numbers of rows that it is ready for. group: the ranks
    that compute the same rows; all take the tokens that the first one draws.

    >>> decoder = Decoder(model, [[1, 2, 3], [4, 5]], sampler, cache=cache, device=device)
    >>> for tokens in decoder:  # one per row
    ...     decoder.keep([row for row, token in zip(decoder.rows, tokens) if token != end])
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        sampler: Sampler,
        *,
        cache: KVCache,
        device: torch.device,
        copies: int = 1,
        step: DecodingStep | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model, self.cache, self.sampler, self.group, self.device = model, cache, sampler, group, device
        self.rows = list(range(len(prompts) * copies))
        """The rows that are still continued. The copies of a prompt are next to each other."""
        self.fed: list[int] = []
        """Of a single row, the ids that are in the cache now and were not before."""
        self.speed = Speed(prefill_tokens=sum(map(len, prompts)))
        longest = max(map(len, prompts))
        self._ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])  # [B, T]
        self._copies = copies
        self._step = step

    def __iter__(self) -> Iterator[list[int]]:
        """Yields a token for each of ``rows``, until none is kept or the caller has enough."""
        begin = time.perf_counter()
        logits = self._prefill()
        tokens = self._pick(logits)
        self.speed.prefill_seconds = time.perf_counter() - begin
        yield tokens
        while self.rows:
            begin = time.perf_counter()
            tokens = self._pick(self._forward(self._ids))
            self.speed.decode_seconds += time.perf_counter() - begin
            self.speed.decode_tokens += len(tokens)
            yield tokens

    def keep(self, rows: list[int]) -> None:
        """Go on with these of ``rows`` alone; the others no longer cost time."""
        if len(rows) == len(self.rows):
            return
        index = [self.rows.index(row) for row in rows]
        self.rows = rows
        if rows:
            self._select(index)
            self.sampler.select(index)
            self._ids = self._ids[index]

    def _prefill(self) -> Tensor:
        for ids in self._ids.split(_PREFILL, dim=1):
            logits = self._forward(ids)
        if self._copies > 1:
            prompts = [row // self._copies for row in self.rows]
            self._select(prompts)
            logits = logits[prompts]
        return logits

    @torch.inference_mode()  # as the model has made the cache: a graph is compiled for one kind of tensors
    def _select(self, rows: list[int]) -> None:
        self.cache.select(rows)

    def _forward(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            fed = ids[0].tolist() if len(ids) == 1 else []  # before it is on a GPU, which would be waited for
            ids = ids.to(self.device)
            step = self._step
            if step is not None and ids.shape[1] == 1 and self.cache.length and step.ready(len(ids)):
                logits = step(ids, cache=self.cache)
            else:
                logits = self.model(ids, positions=self.cache.positions(ids), cache=self.cache)
            self.cache.advance(ids.shape[1])
            self.fed += fed
            return logits[:, -1]

    def _pick(self, logits: Tensor) -> list[int]:
        with torch.inference_mode():
            tokens = self.sampler.pick(logits)
        if self.group is not None:  # ranks must not part ways over a rounding error
            drawn = torch.tensor(tokens, device=self.device)
            dist.broadcast(drawn, group=self.group, group_src=0)
            tokens = drawn.tolist()
        self._ids = torch.tensor(tokens)[:, None]
        return tokens
