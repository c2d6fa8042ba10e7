"""Qwen3 as the rest of the program sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchtitan_style.models.spec import Dimension, ModelSpec

from .config import FLAVORS, Qwen3Config
from .hf import from_hf, parameter_shapes, to_hf

if TYPE_CHECKING:
    import torch


# Torch is imported by what needs it, when it is called.


def _build(config: Qwen3Config) -> Any:
    from .model import Qwen3ForCausalLM

    return Qwen3ForCausalLM(config)


def _parallelize(*args: Any, **named: Any) -> None:
    from .parallelize import parallelize_qwen3

    parallelize_qwen3(*args, **named)


def _tensor_parallel_dim(name: str) -> int | None:
    """As ``_apply_tensor_parallel`` in parallelize.py lays them out."""
    *_, module, kind = name.split(".")
    if module in ("o_proj", "down_proj"):  # row-wise: the bias is added once, after the sum
        return 1 if kind == "weight" else None
    return None if "norm" in module else 0


def _is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """A matrix of attention or MLP; not the embedding, nor the head."""
    return parameter.ndim == 2 and ".layers." in f".{name}"


def _has_heads(name: str) -> bool:
    return name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))


def _inference() -> Any:
    from . import inference

    return inference


QWEN3 = ModelSpec(
    name="qwen3",
    config_class=Qwen3Config,
    flavors=FLAVORS,
    parameter_shapes=parameter_shapes,
    shape_fields=(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "attention_bias",
        "tie_word_embeddings",
    ),
    tensor_parallel=(
        Dimension("num_attention_heads", "query heads"),
        Dimension("num_key_value_heads", "key/value heads"),
        Dimension("intermediate_size", "rows of the MLP's matrices"),
        Dimension("vocab_size", "rows of the vocabulary"),
    ),
    tensor_parallel_dim=_tensor_parallel_dim,
    context_parallel=True,
    build=_build,
    pipeline=True,
    parallelize=_parallelize,
    is_hidden_matrix=_is_hidden_matrix,
    has_heads=_has_heads,
    hf_architecture="Qwen3ForCausalLM",
    from_hf=from_hf,
    to_hf=to_hf,
    inference=_inference,
)
