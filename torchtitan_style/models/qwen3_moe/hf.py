"""Qwen3-MoE in Transformers' format: what ``config.json`` says, and which tensors belong to it.

Plain data: nothing here imports torch.
"""

from __future__ import annotations

from typing import Any

from torchtitan_style.models.qwen3 import hf as qwen3

from .config import Qwen3MoeConfig

# What Transformers takes a field for that config.json leaves out (its Qwen3MoeConfig).
_ABSENT = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
_NUM_EXPERTS = 128


def from_hf(settings: dict[str, Any]) -> Qwen3MoeConfig:
    """The dimensions that a ``config.json`` describes.

    Raises ValueError, naming the field, for what is not implemented
    (rope scaling, quantization, another activation), and for values that contradict each other.
    """
    values = qwen3.common_fields(settings, _ABSENT)
    # Transformers 5 has another name for it.
    name = "num_local_experts" if "num_experts" not in settings else "num_experts"
    values["num_experts"] = qwen3.field_of(settings, name, int, _NUM_EXPERTS)
    width = values["hidden_size"] // max(values["num_attention_heads"], 1)
    values["head_dim"] = qwen3.field_of(settings, "head_dim", int, width)
    if values["use_sliding_window"]:  # in all layers
        values["sliding_window"] = qwen3.field_of(settings, "sliding_window", int, 0, absent=4096)
        if not values["sliding_window"]:
            raise ValueError("use_sliding_window is true, but sliding_window is null")
    layers = settings.get("mlp_only_layers") or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"mlp_only_layers must be a list of layers' numbers, not {layers!r}")
    return Qwen3MoeConfig(**values, mlp_only_layers=tuple(layers))


def to_hf(config: Qwen3MoeConfig) -> dict[str, Any]:
    """The arguments for ``transformers.Qwen3MoeConfig`` that describe ``config``.

    ``dropout`` and the router's z-loss have no counterpart there; they matter in training only.
    """
    fields = qwen3.to_hf(config)
    for name in ("router_z_loss_coef", "max_window_layers"):
        del fields[name]
    return fields | {"mlp_only_layers": list(config.mlp_only_layers)}


def parameter_shapes(config: Qwen3MoeConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters, in the order of the layers; a tied head is not one."""
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    sparse: dict[str, tuple[int, ...]] = {
        "mlp.gate.weight": (experts, hidden),
        "mlp.experts.gate_up_proj": (experts, 2 * width, hidden),
        "mlp.experts.down_proj": (experts, hidden, width),
    }
    return qwen3.parameter_shapes(config, lambda layer: sparse if config.is_sparse(layer) else qwen3.mlp_shapes(config))
