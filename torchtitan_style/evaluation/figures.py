"""Sums over documents, and the figures that follow from them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass
class Document:
    """One document and, once it is scored, its sums."""

    file: int
    """Which of the files it is in."""
    index: int
    """Its number in the file, from 0."""
    place: str
    """Where it is in the file, for a person: "line 17"."""
    tokens: int
    """Those that are scored."""
    bytes: int
    """Of its text in UTF-8; of a conversation, of its scored tokens."""
    loss: float = 0.0
    """Sum over its tokens, in nats."""
    right: int = 0
    """Tokens that the model finds the likeliest."""
    windows: int = 0
    """Those that are still to be scored."""
    bytes_per_window: float = 0.0
    """Of what was read, for progress."""

    def figures(self) -> dict[str, float | None]:
        return _figures(self)


@dataclass
class Sums:
    """What several documents add up to."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    loss: float = 0.0
    right: int = 0
    unreadable: int = 0
    """Documents that could not be read."""
    loss_squared: float = 0.0
    loss_tokens: float = 0.0
    tokens_squared: int = 0

    def add(self, document: Document) -> None:
        self.documents += 1
        self.tokens += document.tokens
        self.bytes += document.bytes
        self.loss += document.loss
        self.right += document.right
        self.loss_squared += document.loss**2
        self.loss_tokens += document.loss * document.tokens
        self.tokens_squared += document.tokens**2

    def __add__(self, other: Sums) -> Sums:
        names = [field.name for field in dataclasses.fields(self)]
        return Sums(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def standard_error(self) -> float | None:
        """Of the mean loss per token, if other documents of the same kind had been drawn; None of fewer than two.

        The loss is a ratio of two sums over documents, and its error that of ratio estimation (Cochran, Sampling
        Techniques, 1977, section 6.4): of the residuals lossᵢ - mean · tokensᵢ.
        """
        if self.documents < 2:
            return None
        mean = self.loss / self.tokens
        residuals = self.loss_squared - 2 * mean * self.loss_tokens + mean**2 * self.tokens_squared
        return math.sqrt(max(residuals, 0.0) * self.documents / (self.documents - 1)) / self.tokens

    def figures(self) -> dict[str, Any]:
        """What a person asks for; None where it is not defined."""
        counts = {name: getattr(self, name) for name in ("documents", "tokens", "bytes", "unreadable")}
        if not self.tokens:
            names = ("loss", "loss_standard_error", "perplexity", "bits_per_byte", "accuracy")
            return counts | dict.fromkeys(names)
        return counts | _figures(self) | {"loss_standard_error": self.standard_error()}


def _figures(sums: Document | Sums) -> dict[str, float | None]:
    """Per token and per byte. An answer of special tokens only has no bytes."""
    loss = sums.loss / sums.tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": sums.loss / math.log(2) / sums.bytes if sums.bytes else None,
        "accuracy": sums.right / sums.tokens,
    }
