"""Qwen3-MoE as the rest of the program sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchtitan_style.models.qwen3.spec import QWEN3
from torchtitan_style.models.spec import Dimension, ModelSpec, OnDisk

from .config import FLAVORS, Qwen3MoeConfig
from .hf import from_hf, parameter_shapes, to_hf

if TYPE_CHECKING:
    import torch


# Torch is imported by what needs it, when it is called.


def _build(config: Qwen3MoeConfig) -> Any:
    from .model import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(config)


def _use_definition(model: Any) -> None:
    from .experts import Experts, loop_over_experts

    for module in model.modules():
        if isinstance(module, Experts):
            module.run = loop_over_experts


def _parallelize(*args: Any, **named: Any) -> None:
    from .parallelize import parallelize_qwen3_moe

    parallelize_qwen3_moe(*args, **named)


def _is_expert(name: str) -> bool:
    return ".mlp.experts." in name


def _tensor_parallel_dim(name: str) -> int | None:
    """Neither experts nor their router are cut."""
    return None if _is_expert(name) or _is_router(name) else QWEN3.tensor_parallel_dim(name)


def _is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """A matrix of attention, of an MLP, a router or, stacked, of experts; not the embedding or the head."""
    return parameter.ndim >= 2 and ".layers." in f".{name}"


def _is_router(name: str) -> bool:
    return name.endswith("mlp.gate.weight")


def _stacked_rows(name: str, shape: tuple[int, ...]) -> int | None:
    if name.endswith("experts.gate_up_proj"):
        return shape[1] // 2
    return shape[1] if name.endswith("experts.down_proj") else None


def _on_disk(config: Qwen3MoeConfig) -> dict[str, tuple[OnDisk, ...]]:
    """On disk each expert's matrices are tensors of their own; in memory they are stacked, as in Transformers 5."""
    width, found = config.moe_intermediate_size, dict[str, tuple[OnDisk, ...]]()
    for name in parameter_shapes(config):
        experts, is_gate_up, _ = name.partition("gate_up_proj")
        if is_gate_up:
            halves = ("gate_proj", slice(0, width)), ("up_proj", slice(width, 2 * width))
            found[name] = tuple(
                OnDisk(f"{experts}{j}.{half}.weight", (j, rows))
                for j in range(config.num_experts)
                for half, rows in halves
            )
        elif name.endswith("experts.down_proj"):
            experts = name.removesuffix("down_proj")
            found[name] = tuple(OnDisk(f"{experts}{j}.down_proj.weight", (j,)) for j in range(config.num_experts))
        else:
            found[name] = (OnDisk(name),)
    return found


def _inference() -> Any:
    from . import inference

    return inference


QWEN3_MOE = ModelSpec(
    name="qwen3_moe",
    config_class=Qwen3MoeConfig,
    flavors=FLAVORS,
    parameter_shapes=parameter_shapes,
    shape_fields=(
        *QWEN3.shape_fields,
        "num_experts",
        "moe_intermediate_size",
        "decoder_sparse_step",
        "mlp_only_layers",
    ),
    tensor_parallel=QWEN3.tensor_parallel,
    tensor_parallel_dim=_tensor_parallel_dim,
    expert_parallel=(Dimension("num_experts", "experts"),),
    is_expert=_is_expert,
    context_parallel=True,
    pipeline=True,
    build=_build,
    use_definition=_use_definition,
    parallelize=_parallelize,
    is_hidden_matrix=_is_hidden_matrix,
    is_router=_is_router,
    has_heads=QWEN3.has_heads,
    stacked_rows=_stacked_rows,
    hf_architecture="Qwen3MoeForCausalLM",
    from_hf=from_hf,
    to_hf=to_hf,
    on_disk=_on_disk,
    inference=_inference,
)
