"""Qwen3-MoE: Qwen3 with a mixture of experts in place of the MLP.

What is notable (Qwen3 Technical Report, section 2):
  - each token is routed to the k experts of E that the router finds likeliest
  - no shared expert; no capacity, so no token is dropped
  - a load-balancing loss over the whole batch, which lets experts specialise (``train/balance.py``)

Attention, norms, embedding, head and loss are Qwen3's own. Module names are those of Transformers' Qwen3-MoE, so
state dicts can be exchanged by name. Nothing here knows of ranks.

Shapes: B batch, T positions, C hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from torchtitan_style.models.qwen3.model import Cache, DecoderLayer, Qwen3ForCausalLM, Qwen3Model

from .config import Qwen3MoeConfig
from .experts import Experts
from .router import Router, Routing, measure, sort_by_expert


class MoE(nn.Module):
    """Each token's sum over its experts, weighted by the router (Shazeer et al. 2017, equation 1)."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        self.gate = Router(
            config.hidden_size,
            experts=config.num_experts,
            chosen=config.num_experts_per_tok,
            normalise=config.norm_topk_prob,
        )
        self.experts = Experts(config.hidden_size, experts=config.num_experts, width=config.moe_intermediate_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x: [B, T, C] → the same shape, and how its tokens were routed."""
        tokens = x.flatten(0, 1)
        logits, weights, experts = self.gate(tokens)
        order, counts = sort_by_expert(experts, logits.shape[-1])
        return self.experts(tokens, weights, order, counts).view_as(x), measure(logits, counts)


class SparseLayer(DecoderLayer):
    """One transformer block with experts."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | BlockMask | None = None,
        *,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Routing]:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache=cache))
        y, routing = self.mlp(self.post_attention_layernorm(x))
        return x + self.dropout(y), routing


class Qwen3MoeModel(Qwen3Model):
    """Embedding, blocks and final norm."""

    config: Qwen3MoeConfig

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__(config)
        self.routing: list[Routing] = []
        """Of the last call, layer by layer."""

    def build_layer(self, layer: int) -> DecoderLayer:
        if self.config.is_sparse(layer):
            return SparseLayer(self.config, layer, MoE(self.config))
        return DecoderLayer(self.config, layer)

    def run_layer(self, layer: nn.Module, x: Tensor, *inputs: Any, **named: Any) -> Tensor:
        output = layer(x, *inputs, **named)
        if isinstance(output, Tensor):
            return output
        x, routing = output
        self.routing.append(routing)
        return x

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        self.routing = []
        return super().forward(*inputs, **named)


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """Qwen3-MoE with its language-model head.

    ``model.routing`` has the sums that the load-balancing loss is made of.
    """

    config: Qwen3MoeConfig

    def build_model(self) -> Qwen3MoeModel:
        return Qwen3MoeModel(self.config)

    def initial_std(self, name: str) -> float | None:
        """As Qwen3's, experts like the MLP that they take the place of."""
        return super().initial_std(name.replace("experts.down_proj", "experts.down_proj.weight"))
