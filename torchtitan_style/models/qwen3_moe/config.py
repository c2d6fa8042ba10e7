"""The shape of a Qwen3-MoE model, as plain data.

Field names and meanings are those of ``transformers.Qwen3MoeConfig``. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchtitan_style.models.qwen3.config import Qwen3Config

_MOST_EXPERTS = 2**17
"""Each is three tensors in Transformers' files. Qwen3-235B-A22B has 12,032."""


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(Qwen3Config):
    """Dimensions and options of a Qwen3-MoE model (Qwen3 Technical Report, section 2).

    The defaults are those of Qwen3-30B-A3B.
    """

    hidden_size: int = 2048
    """Width of the residual stream, C."""
    intermediate_size: int = 6144
    """Width of the SwiGLU feed-forward layer, in layers without experts."""
    num_hidden_layers: int = 48
    """Number of transformer blocks."""
    num_attention_heads: int = 32
    """Query heads, H."""
    num_key_value_heads: int = 4
    """Key/value heads, K; each serves H/K query heads (grouped-query attention)."""
    tie_word_embeddings: bool = False
    """Whether the LM head uses the embedding's matrix."""
    max_window_layers: int = 0
    """The first layer that uses the sliding window: 0, as in Transformers' Qwen3-MoE, where all layers use it or
    none does."""
    num_experts: int = 128
    """Experts in a layer, E."""
    num_experts_per_tok: int = 8
    """Experts that each token is routed to, k."""
    moe_intermediate_size: int = 768
    """Width of an expert's SwiGLU layer, I."""
    norm_topk_prob: bool = True
    """Whether the weights of the chosen experts are divided by their sum."""
    decoder_sparse_step: int = 1
    """One layer in this many has experts; the others are dense."""
    mlp_only_layers: tuple[int, ...] = ()
    """Layers, from 0, that are dense in any case."""
    router_aux_loss_coef: float = 0.001
    """Weight of the load-balancing loss in the training loss; 0: none."""
    router_z_loss_coef: float = 0.0
    """Weight of the router's z-loss, the mean of log² of the softmax's normaliser over tokens and layers, in the
    training loss, as 1e-3 (Zoph et al. 2022, equation 5). Not in Transformers' Qwen3-MoE."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers))  # a list in TOML and JSON
        super().__post_init__()

    def problems(self) -> list[tuple[tuple[str, ...], str]]:
        """What makes this shape impossible, as (fields concerned, explanation) pairs."""
        found = super().problems()
        sizes = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
        for name in sizes:
            if getattr(self, name) < 1:
                found.append(((name,), f"must be at least 1, not {getattr(self, name)}"))
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, name) % 8:
                found.append(((name,), f"must be a multiple of 8 (16 bytes in bfloat16), not {getattr(self, name)}"))
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                found.append(((name,), f"must be at least 0 and finite, not {getattr(self, name)}"))
        if self.use_sliding_window and self.max_window_layers:
            found.append((("max_window_layers",), "must be 0: with use_sliding_window all layers have the window"))
        if found:
            return found
        chosen, experts, layers = self.num_experts_per_tok, self.num_experts, self.num_hidden_layers
        if experts * layers > _MOST_EXPERTS:
            found.append((("num_experts", "num_hidden_layers"), f"at most {_MOST_EXPERTS:,} experts in all layers"))
        if experts < chosen:
            found.append(
                (
                    ("num_experts_per_tok", "num_experts"),
                    f"a token cannot be routed to {chosen} experts where there are {experts}",
                )
            )
        if absent := [layer for layer in self.mlp_only_layers if not 0 <= layer < layers]:
            found.append(
                (
                    ("mlp_only_layers", "num_hidden_layers"),
                    f"the model has no layer {absent[0]}: its layers are 0 to {layers - 1}",
                )
            )
        elif not found and not any(self.is_sparse(layer) for layer in range(layers)):
            found.append(
                (("mlp_only_layers", "decoder_sparse_step"), 'no layer has experts; model.name = "qwen3" is dense')
            )
        return found

    def is_sparse(self, layer: int) -> bool:
        """Whether ``layer`` (from 0) has experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @property
    def num_sparse_layers(self) -> int:
        """Layers that have experts."""
        return sum(self.is_sparse(layer) for layer in range(self.num_hidden_layers))

    @property
    def num_matmul_parameters(self) -> int:
        """Weights that each token is multiplied with: of experts, only the chosen ones."""
        dense = 3 * self.hidden_size * self.intermediate_size
        sparse = self._experts(self.num_experts_per_tok) + self.hidden_size * self.num_experts
        return super().num_matmul_parameters + self.num_sparse_layers * (sparse - dense)

    @property
    def num_parameters(self) -> int:
        """All weights, a tied embedding counted once."""
        idle = self.num_experts - self.num_experts_per_tok
        return self.num_active_parameters + self.num_sparse_layers * self._experts(idle)

    @property
    def num_active_parameters(self) -> int:
        """Those that a token meets: of experts, only the chosen ones."""
        return super().num_parameters

    def _experts(self, count: int) -> int:
        return 3 * count * self.hidden_size * self.moe_intermediate_size


FLAVORS: dict[str, Qwen3MoeConfig] = {
    # For tests and for looking at things: trains on anything in no time, learns little.
    "debug": Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
    ),
    # Minutes on two CPU cores. As many active parameters as the dense "small".
    "small": Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=192,
    ),
    # The published models (their config.json files; Qwen3 Technical Report, table 2).
    "30B-A3B": Qwen3MoeConfig(),
    "235B-A22B": Qwen3MoeConfig(
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=94,
        num_attention_heads=64,
        moe_intermediate_size=1536,
    ),
}
"""Named shapes for ``model.flavor``."""
