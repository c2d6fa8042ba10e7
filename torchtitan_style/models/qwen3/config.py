"""The shape of a Qwen3 model, as plain data.

Field names and meanings are those of ``transformers.Qwen3Config``, so that a published
``config.json`` can be read field by field. Nothing here imports torch: the configuration
is checked before torch is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple


class Yarn(NamedTuple):
    """How rotary wavelengths are stretched for rows longer than a model was trained on; see ``rotary.py``."""

    factor: float
    trained_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    """Of cosines and sines: queries and keys are both multiplied by it, so that scores are by its square."""
    truncate: bool


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Dimensions and options of a Qwen3 model (Qwen3 Technical Report, section 2).

    The defaults are those of Qwen3-0.6B, the smallest published model.
    """

    vocab_size: int = 151_936
    """Rows of the embedding and of the LM head. Token ids must be below it."""
    hidden_size: int = 1024
    """Width of the residual stream, C."""
    intermediate_size: int = 3072
    """Width of the SwiGLU feed-forward layer."""
    num_hidden_layers: int = 28
    """Number of transformer blocks."""
    num_attention_heads: int = 16
    """Query heads, H."""
    num_key_value_heads: int = 8
    """Key/value heads, K; each serves H/K query heads (grouped-query attention)."""
    head_dim: int = 128
    """Size of one head, D. Qwen3 does not tie it to hidden_size / num_attention_heads."""
    max_position_embeddings: int = 40_960
    """Maximum number of positions; training.seq_len may not exceed it."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square before the root, in every RMSNorm."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary embedding's wavelengths."""
    rope_type: str = "default"
    """"default", or "yarn" for rows longer than the model was trained on, which needs rope_factor and
    original_max_position_embeddings (Peng et al. 2023)."""
    rope_factor: float = 1.0
    """With rope_type = "yarn": by how much the longest wavelengths are stretched, as 4."""
    original_max_position_embeddings: int = 0
    """With rope_type = "yarn": positions that the model was originally trained on, as 32768."""
    rope_beta_fast: float = 32.0
    """With rope_type = "yarn": wavelengths that fit at least this many times into those positions are not stretched."""
    rope_beta_slow: float = 1.0
    """With rope_type = "yarn": those that fit at most this many times are stretched by the whole factor."""
    rope_attention_factor: float = 0.0
    """With rope_type = "yarn": what cosines and sines are multiplied by; 0: 0.1 · ln(rope_factor) + 1."""
    rope_truncate: bool = True
    """With rope_type = "yarn": whether the bounds of the partly stretched dimensions are rounded to whole numbers."""
    attention_bias: bool = False
    """Whether the q, k, v and o projections have a bias."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight while training."""
    dropout: float = 0.0
    """Probability of dropping an element of the embeddings' and of each residual branch's
    output while training. Not in Transformers' Qwen3, where it is always 0."""
    tie_word_embeddings: bool = True
    """Whether the LM head uses the embedding's matrix."""
    use_sliding_window: bool = False
    """Whether the layers from max_window_layers on look back only sliding_window positions."""
    sliding_window: int = 4096
    """Positions a sliding-window layer sees, the current one included."""
    max_window_layers: int = 28
    """The first layer that uses the sliding window; earlier layers attend to all positions."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ValueError("; ".join(f"{', '.join(keys)}: {text}" for keys, text in problems))

    def problems(self) -> list[tuple[tuple[str, ...], str]]:
        """What makes this shape impossible, as (fields concerned, explanation) pairs."""
        found: list[tuple[tuple[str, ...], str]] = []
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                found.append(((name,), f"must be at least 1, not {getattr(self, name)}"))
        for name, most in MOST.items():
            if getattr(self, name, 0) > most:
                found.append(((name,), f"must be at most {most:,}"))
        for name in ("attention_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                found.append(((name,), f"must be in [0, 1), not {getattr(self, name)}"))
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                found.append(((name,), f"must be greater than 0 and finite, not {getattr(self, name)}"))
        found += self._rope_problems()
        if self.max_window_layers < 0:
            found.append((("max_window_layers",), "must be at least 0"))
        if found:
            return found
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            found.append(
                (
                    ("num_attention_heads", "num_key_value_heads"),
                    f"{heads} query heads cannot be shared out evenly over {groups} key/value heads",
                )
            )
        if self.head_dim % 2:
            found.append((("head_dim",), f"must be even (rotary embedding), not {self.head_dim}"))
        return found

    def _rope_problems(self) -> list[tuple[tuple[str, ...], str]]:
        if self.rope_type == "default":
            return [
                ((name, "rope_type"), f'is only read with rope_type = "yarn"; without, it must be {default}')
                for name, default in YARN_FIELDS.items()
                if getattr(self, name) != default
            ]
        if self.rope_type != "yarn":
            return [(("rope_type",), f'must be "default" or "yarn", not "{self.rope_type}"')]
        found: list[tuple[tuple[str, ...], str]] = []
        if not self.rope_theta > 1:
            found.append((("rope_theta", "rope_type"), 'must be greater than 1 with rope_type = "yarn"'))
        if not 1 <= self.rope_factor < math.inf:
            found.append((("rope_factor",), f"must be at least 1, not {self.rope_factor}"))
        if self.original_max_position_embeddings < 1:
            text = 'rope_type = "yarn" needs the positions that the model was trained on before, as 32768'
            found.append((("original_max_position_embeddings", "rope_type"), text))
        if not 0 < self.rope_beta_slow < self.rope_beta_fast < math.inf:
            text = f"{self.rope_beta_fast} must be greater than rope_beta_slow, {self.rope_beta_slow}, and that than 0"
            found.append((("rope_beta_fast", "rope_beta_slow"), text))
        if not 0 <= self.rope_attention_factor < math.inf:
            found.append((("rope_attention_factor",), f"must be at least 0, not {self.rope_attention_factor}"))
        return found

    @property
    def yarn(self) -> Yarn | None:
        """None with rope_type = "default"."""
        if self.rope_type == "default":
            return None
        return Yarn(
            factor=self.rope_factor,
            trained_positions=self.original_max_position_embeddings,
            beta_fast=self.rope_beta_fast,
            beta_slow=self.rope_beta_slow,
            attention_factor=self.rope_attention_factor or 0.1 * math.log(self.rope_factor) + 1.0,
            truncate=self.rope_truncate,
        )

    def window(self, layer: int) -> int | None:
        """Positions that ``layer`` (from 0) looks back on, or None for all of them."""
        windowed = self.use_sliding_window and layer >= self.max_window_layers
        return self.sliding_window if windowed else None

    @property
    def windows(self) -> list[int | None]:
        """``window`` of each layer."""
        return [self.window(layer) for layer in range(self.num_hidden_layers)]

    @property
    def num_matmul_parameters(self) -> int:
        """Weights that each token is multiplied with: all matrices but the embedding look-up."""
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (2 * query + 2 * key_value)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (attention + mlp) + self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All weights, a tied embedding counted once."""
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        norms = 2 * self.hidden_size + 2 * self.head_dim
        bias = 0
        if self.attention_bias:
            bias = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim + self.hidden_size
        per_layer = self.num_hidden_layers * (norms + bias)
        return self.num_matmul_parameters + embedding + per_layer + self.hidden_size

    @property
    def num_active_parameters(self) -> int:
        """Those that a token meets: all."""
        return self.num_parameters

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations to train on one token of a row of ``seq_len`` tokens.

        6 per matrix weight (forward 2, backward 4) and 12·H·D·S per layer for the scores and
        their weighted sum over S positions (PaLM, Chowdhery et al. 2022, appendix B). As
        there, S is the whole row or window although a causal mask needs half of it, and
        recomputation does not count.
        """
        spans = (min(seq_len, window or seq_len) for window in self.windows)
        return 6 * self.num_matmul_parameters + 12 * self.num_attention_heads * self.head_dim * sum(spans)


YARN_FIELDS = {
    f.name: f.default
    for f in fields(Qwen3Config)
    if f.name == "original_max_position_embeddings"
    or (f.name.startswith("rope_") and f.name not in ("rope_theta", "rope_type"))
}
"""Fields that are read with YaRN only, and what they are without."""

_MAY_BE_0 = ("max_window_layers", "original_max_position_embeddings")
_POSITIVE = tuple(f.name for f in fields(Qwen3Config) if f.type == "int" and f.name not in _MAY_BE_0)


MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "max_position_embeddings": 2**40,
    "sliding_window": 2**40,
    "max_window_layers": 2**40,
    "num_experts": 2**13,
    "moe_intermediate_size": 2**20,
    "decoder_sparse_step": 2**12,
}
"""Dimensions, those of families built on this one too, are at most so large: many times what any model has, and little
enough that the names of all parameters can be listed."""


def _published(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        max_window_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=tied,
    )


FLAVORS: dict[str, Qwen3Config] = {
    # For tests and for looking at things: trains on anything in no time, learns little.
    "debug": Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=2048,
        max_window_layers=2,
    ),
    # The default: minutes on two CPU cores.
    "small": Qwen3Config(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        max_window_layers=4,
    ),
    # 384 wide with 6 layers: the usual size of a from-scratch exercise.
    "mini": Qwen3Config(
        vocab_size=49_152,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=48,
        max_position_embeddings=2048,
        max_window_layers=6,
        dropout=0.1,
    ),
    # The published models (their config.json files; Qwen3 Technical Report, table 1).
    "0.6B": _published(1024, 3072, 28, 16, tied=True),
    "1.7B": _published(2048, 6144, 28, 16, tied=True),
    "4B": _published(2560, 9728, 36, 32, tied=True),
    "8B": _published(4096, 12_288, 36, 32, tied=False),
    "14B": _published(5120, 17_408, 40, 40, tied=False),
    "32B": _published(5120, 25_600, 64, 64, tied=False),
}
"""Named shapes for ``model.flavor``."""
