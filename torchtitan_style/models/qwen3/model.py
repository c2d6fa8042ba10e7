"""Qwen3, a decoder-only transformer, as plain PyTorch modules.

What is notable (Qwen3 Technical Report, section 2):
  - RMSNorm before attention, before the MLP, and at the end; no bias (optional in attention)
  - rotary position embedding (``rotary.py``)
  - grouped-query attention, with RMSNorm on each head of q and k ("QK-norm")
  - SwiGLU feed-forward
  - LM head tied to the embedding in the small models
  - optional sliding window from layer ``max_window_layers`` on

Module names are those of Transformers' Qwen3, so state dicts can be exchanged by name.
Nothing here knows of ranks: under tensor parallelism each rank holds some of the heads, and
``view(b, t, -1, head_dim)`` finds out how many.

Shapes: B batch, T positions, S positions in the cache and these, H query heads, K key/value heads,
D head size, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from .attention import PartMask, attend, attention_mask, document_positions, part_mask
from .config import Qwen3Config
from .rotary import apply_rotary, rotary_cos_sin


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.read_weight: Callable[[Tensor], Tensor] | None = None
        """Where the parameter is not a plain tensor: how to get one from it."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight if self.read_weight is None else self.read_weight(self.weight), self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., D]; weight: [D]. See ``RMSNorm``."""
    # bf16 has 8 bits of mantissa: the sum of squares is taken in fp32.
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


class RowPart(Protocol):
    """The positions of a row that inputs have, where rows are shared out (``config/layout.py``)."""

    @property
    def ranks(self) -> int:
        """In how many parts a row is shared out."""
        ...

    def spans(self, seq_len: int) -> tuple[tuple[int, int], ...]:
        """Beginning and end of each span of positions, all of one length."""
        ...


class Cache(Protocol):
    """Keys and values of earlier positions, kept by who generates text (``inference/cache.py``)."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add k, v [B, K, T, D] of ``layer``; return all that its queries may see, [B, K, S, D], and a mask [B or 1,
        1, T, S], True where they see it; None: everything before (T = 1) or the causal mask of nothing before."""
        ...


class Attention(nn.Module):
    """Causal grouped-query attention with QK-norm."""

    def __init__(self, config: Qwen3Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.attention_dropout = config.attention_dropout
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.attend: Callable[..., Tensor] = attend
        """(q, k, v, mask, dropout=) → y; training may set another way to compute the same."""

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | BlockMask | PartMask | None = None,
        *,
        cache: Cache | None = None,
    ) -> Tensor:
        b, t, _ = x.shape  # x: [B, T, C]
        q = self.q_norm(self.q_proj(x).view(b, t, -1, self.head_dim))  # [B, T, H, D]
        k = self.k_norm(self.k_proj(x).view(b, t, -1, self.head_dim))  # [B, T, K, D]
        v = self.v_proj(x).view(b, t, -1, self.head_dim)  # [B, T, K, D]
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, D], 2 × [B, K, T, D]

        if cache is not None:
            k, v, mask = cache.update(self.layer, k, v)  # [B, K, S, D]
        y = self.attend(q, k, v, mask, dropout=self.attention_dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))  # [B, T, C]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020, equation 5)."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One transformer block: attention and MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: Qwen3Config, layer: int, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config) if mlp is None else mlp
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | BlockMask | PartMask | None = None,
        *,
        cache: Cache | None = None,
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache=cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Qwen3Model(nn.Module):
    """Embedding, blocks and final norm: token ids [B, T] to hidden states [B, T, C]."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        # nn.Embedding() would draw weights here, for which torch imports its compiler on the meta device.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(self.build_layer(i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.part: RowPart | None = None
        """Where rows are shared out over ranks, the positions of each row that inputs have; None: they are whole rows.
        Training sets it, and attention that gathers the keys of the whole row."""

    def build_layer(self, layer: int) -> DecoderLayer:
        """Block ``layer``, from 0."""
        return DecoderLayer(self.config, layer)

    def run_layer(self, layer: nn.Module, x: Tensor, *inputs: Any, **named: Any) -> Tensor:
        """What a block makes of the residual stream x [B, T, C]."""
        y: Tensor = layer(x, *inputs, **named)
        return y

    def forward(
        self,
        input_ids: Tensor,
        documents: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """input_ids: [B, T]. documents: [B, T] integers, or None; tokens attend to those of the same number only.
        positions: [B, T]; left out: counted from where each document begins. cache: of the positions before.

        Any of the parts may be None and is left out: without ``embed_tokens``, ``input_ids`` are the hidden states
        [B, T, C] that the blocks before these made, and positions must be given.

        With ``part``, input_ids and positions, which must be given, are a part of each row, [B, t], and documents are
        those of all of it."""
        t = (input_ids if positions is None else positions).shape[1]
        if self.part is not None and positions is None and cache is None:
            raise ValueError("parts of rows need their positions")
        x = input_ids if self.embed_tokens is None else self.dropout(self.embed_tokens(input_ids))
        if positions is None and documents is not None:
            positions = document_positions(documents)
        elif positions is None:
            positions = torch.arange(t, device=input_ids.device)[None]
        config = self.config
        cos, sin = rotary_cos_sin(positions, head_dim=config.head_dim, theta=config.rope_theta, yarn=config.yarn)
        cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)  # [B, T, 1, D]
        if cache is not None:  # it knows what may be attended to
            for layer in self.layers:
                x = x if layer is None else self.run_layer(layer, x, cos, sin, cache=cache)
            return x if self.norm is None else self.norm(x)
        windows = self.config.windows
        masks = {window: self.mask(documents, t, window, x.device) for window in set(windows)}
        for layer, window in zip(self.layers, windows, strict=True):
            x = x if layer is None else self.run_layer(layer, x, cos, sin, masks[window])
        return x if self.norm is None else self.norm(x)

    def mask(
        self, documents: Tensor | None, t: int, window: int | None, device: torch.device
    ) -> Tensor | BlockMask | PartMask | None:
        """Where attention is allowed for ``t`` positions, of a layer with this window."""
        # FlexAttention has no backward pass on CPU, and no dropout.
        flex = device.type == "cuda" and not (self.training and self.config.attention_dropout)
        if self.part is None:
            return attention_mask(documents, t, window, flex=flex, device=device)
        row = t * self.part.ranks
        return part_mask(documents, row, window, self.part.spans(row), flex=flex, device=device)


def token_loss(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sum over tokens of -log p(label), fp32, and how many labels are the likeliest token.

    hidden: [B, T, C]; weight: [V, C]; labels: [B, T], -100 where there is nothing to predict. z_loss: weight of
    log² of the softmax's normaliser, which keeps logits from drifting (PaLM, Chowdhery et al. 2022, section 5).
    This is the definition; training swaps in one that never holds all logits (``LMHead.loss_function``).
    """
    return loss_of_logits(F.linear(hidden, weight), labels, z_loss)


def loss_of_logits(logits: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """``token_loss`` of logits [B, T, V]."""
    logits, labels = logits.flatten(0, 1).float(), labels.flatten()  # [B·T, V], [B·T]
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    if z_loss:
        loss = loss + z_loss * (logits.logsumexp(-1).square() * (labels != -100)).sum()
    return loss, (logits.argmax(-1) == labels).sum()


class LMHead(nn.Linear):
    """Hidden states to logits or, given labels, to the loss."""

    loss_function: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = staticmethod(token_loss)
    z_loss: float = 0.0
    """Weight of the z-loss, while training."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if labels is None:
            return super().forward(hidden)  # [B, T, V]
        return self.loss_function(hidden, self.weight, labels, self.z_loss if self.training else 0.0)


class Qwen3ForCausalLM(nn.Module):
    """Qwen3 with its language-model head.

    >>> model = Qwen3ForCausalLM(Qwen3Config(hidden_size=64, num_hidden_layers=2))
    >>> logits = model(torch.tensor([[1, 2, 3]]))  # [1, 3, V]
    """

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.model = self.build_model()
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.reset_parameters()

    def build_model(self) -> Qwen3Model:
        """All but the head."""
        return Qwen3Model(self.config)

    def tie_weights(self) -> None:
        """Let the LM head use the embedding's parameter, if the config says so."""
        if self.config.tie_word_embeddings and self.model.embed_tokens is not None and self.lm_head is not None:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw initial weights from torch's global generator. Those on the meta device have no values."""
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            std = self.initial_std(name)
            if std is None:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, std) if std else parameter.zero_()

    def initial_std(self, name: str) -> float | None:
        """How the parameter ``name`` starts: normal with this standard deviation, or None for all ones.

        | parameters                  | initial value                                           |
        |-----------------------------|---------------------------------------------------------|
        | norm weights                | 1                                                       |
        | biases                      | 0                                                       |
        | o_proj, down_proj           | initializer_range / sqrt(2 · layers), so that the sum   |
        |                             | over all residual branches has the width of one         |
        |                             | (Radford et al. 2019, section 2.3)                      |
        | embedding, all other linear | initializer_range                                       |
        """
        if "norm" in name:
            return None
        if name.endswith("bias"):
            return 0.0
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
        return self.config.initializer_range

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        cache: Cache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, T, V] or, given labels, the sum of the token losses and the number of right guesses.

        input_ids: [B, T]. labels: [B, T], the token that follows each input (already shifted),
        -100 where there is none to predict. documents: [B, T], which document of its row each token belongs to,
        if each is to be by itself. positions: [B, T], counted from where its document begins if left out.
        Where rows are shared out (``Qwen3Model.part``), input_ids, labels and positions are a part of each row. cache:
        keys and values of the positions before these, which are added to it; then only the last one's logits,
        [B, 1, V]. Without ``lm_head`` (None): the hidden states [B, T, C].
        """
        hidden = self.model(input_ids, documents, positions=positions, cache=cache)
        if self.lm_head is None:
            return hidden
        return self.lm_head(hidden if cache is None else hidden[:, -1:], labels)
