"""Qwen3 on a mesh: tensor parallelism, recomputation, compilation and sharding, in that order."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from torchtitan_style.config.schema import ActivationCheckpoint, Compile
from torchtitan_style.distributed.compile import apply_compile
from torchtitan_style.distributed.loss import chunked_cross_entropy
from torchtitan_style.distributed.recompute import apply_activation_checkpoint, recomputes_operations, set_memory_budget
from torchtitan_style.distributed.sharding import compute_in, shard

from .model import Qwen3ForCausalLM, RMSNorm, rms_norm

__all__ = ["parallelize_qwen3"]


def parallelize_qwen3(
    model: Qwen3ForCausalLM,
    mesh: DeviceMesh,
    *,
    activation_checkpoint: ActivationCheckpoint,
    compile: Compile,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
) -> None:
    """Lay ``model`` (best on the meta device) out over ``mesh``, in place.

    mesh: axes ("dp_replicate", "dp_shard", "tp"). The order below matters: each step wraps what the
    one before has made.
    """
    # 1. Tensor parallelism first: it replaces parameters, which breaks the tie of embedding and head.
    if mesh["tp"].size() > 1:
        _apply_tensor_parallel(model, mesh["tp"])
        model.tie_weights()
    model.lm_head.loss_function = chunked_cross_entropy(mesh["tp"].get_group(), compiled=compile.enable)
    # 2. Recomputation and compilation. The compiler must see which operations of a block to recompute;
    # a block recomputed whole is compiled first and just run again.
    layers = model.model.layers
    set_memory_budget(activation_checkpoint, device_type=mesh.device_type, tp=mesh["tp"].size())
    whole = compile.enable and compile.scope == "model"
    recompute_first = whole or recomputes_operations(activation_checkpoint)
    if recompute_first:
        apply_activation_checkpoint(layers, activation_checkpoint)
    apply_compile(model.model, layers, compile, device_type=mesh.device_type)
    if not recompute_first:
        apply_activation_checkpoint(layers, activation_checkpoint)
    # 3. FSDP last: it gathers and frees parameters around the compiled graphs, block by block, or all
    # at once if there is one graph for all. One process has nothing to gather.
    if dist.get_world_size() == 1 and activation_checkpoint.mode in ("none", "memory_budget"):
        compute_in(model, param_dtype)
        return
    shard(
        model,
        [] if whole else layers,
        mesh["dp_replicate", "dp_shard"],
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        reshard_after_forward=reshard_after_forward,
    )


def _apply_tensor_parallel(model: Qwen3ForCausalLM, tp_mesh: DeviceMesh) -> None:
    """Megatron's split of matrices (Shoeybi et al. 2019, section 3) with sequence parallelism
    (Korthikanti et al. 2022, section 4.2.2).

    Between blocks each rank holds T/tp positions of the residual stream. Attention and MLP gather
    the positions, compute a share of the heads or of the intermediate features, and scatter the sum.
    """
    # Norms over C see a part of the positions; those over D (QK-norm) a part of the heads. Their weights
    # are on the tp mesh either way, and their gradients are summed over it.
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": _NormOfPart(),
        "lm_head": _LMHeadParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    block_plan: dict[str, ParallelStyle] = {
        "input_layernorm": _NormOfPart(),
        "self_attn": PrepareModuleInput(
            input_layouts=(Shard(1), None, None, None), desired_input_layouts=(Replicate(), None, None, None)
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.q_norm": _NormOfPart(),
        "self_attn.k_norm": _NormOfPart(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "post_attention_layernorm": _NormOfPart(),
        "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }
    for i in range(len(model.model.layers)):
        plan |= {f"model.layers.{i}.{name}": style for name, style in block_plan.items()}
    parallelize_module(model, tp_mesh, plan)
    model.model.embed_tokens.register_forward_hook(_wait)


class _NormOfPart(ParallelStyle):
    """A norm of the rows that a rank holds, on plain tensors: a norm is a dozen small operations, each of which
    would be dispatched in Python as one of DTensors (docs/performance.md)."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, RMSNorm)
        weight = DTensor.from_local(module.weight.detach(), device_mesh, [Replicate()], run_check=False)
        module.weight = nn.Parameter(weight)

        def forward(x: Tensor) -> Tensor:
            # Each rank finds the part of the weight's gradient that comes from its rows.
            weight: Any = module.weight
            return rms_norm(x, weight.to_local(grad_placements=[Partial()]), module.eps)

        module.forward = forward  # type: ignore[method-assign]
        return module


class _LMHeadParallel(ColwiseParallel):
    """Vocabulary split over the ranks; labels go in beside the hidden states, and the loss, a plain
    number, comes out as it is."""

    @staticmethod
    def _prepare_input_fn(layouts: Any, desired: Any, module: Any, inputs: Any, mesh: DeviceMesh) -> Any:
        hidden, *labels = inputs
        return ColwiseParallel._prepare_input_fn(layouts, desired, module, (hidden,), mesh), *labels

    @staticmethod
    def _prepare_output_fn(layouts: Any, use_local: bool, module: Any, output: Any, mesh: DeviceMesh) -> Any:
        if not isinstance(output, DTensor):
            return output
        return ColwiseParallel._prepare_output_fn(layouts, use_local, module, output, mesh)


def _wait(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Have the embedding's collective finished before a compiled block takes its result.

    A compiled graph drops the gradient towards an input that is still in flight (measured on torch
    2.13: the embedding's gradient is zero). An operation on it waits.
    """
    return output * 1.0
