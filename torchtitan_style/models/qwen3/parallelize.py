"""Qwen3 on a mesh: tensor parallelism, recomputation, compilation and sharding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from torchtitan_style.config.schema import ActivationCheckpoint, Compile
from torchtitan_style.cpu.attention import on_cpu
from torchtitan_style.distributed.compile import apply_compile
from torchtitan_style.distributed.context import Context
from torchtitan_style.distributed.loss import chunked_cross_entropy
from torchtitan_style.distributed.recompute import apply_activation_checkpoint, recomputes_operations, set_memory_budget
from torchtitan_style.distributed.sharding import compute_in, shard
from torchtitan_style.distributed.tensor import NormOfShard, VocabParallelHead, wait_for_output, with_gradient

from .attention import attend, attend_from_part
from .model import DecoderLayer, Qwen3ForCausalLM


def parallelize_qwen3(
    model: Qwen3ForCausalLM,
    mesh: DeviceMesh,
    *,
    activation_checkpoint: ActivationCheckpoint,
    compile: Compile,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
    mlp_plan: Callable[[DecoderLayer], dict[str, ParallelStyle]] | None = None,
    context: Context | None = None,
    placement: Callable[[nn.Parameter], Shard | None] | None = None,
    apart: Mapping[nn.Module, DeviceMesh] | None = None,
    adapt: Callable[[nn.Module], None] | None = None,
) -> None:
    """Lay ``model`` (best on the meta device) out over ``mesh``, in place.

    model: the whole, or a pipeline stage of it (``ModelSpec.pipeline``). mesh: axes ("dp_replicate", "fsdp", "tp").
    mlp_plan: a block's tensor parallelism from the MLP on; None: that of a dense MLP. context: the ranks that share the
    positions of a row; None: each has all. placement, apart: as of ``shard``. adapt: adds adapters. The order below
    matters: each step wraps what the one before has made. Recomputing single operations comes before compilation, whole
    blocks after it.
    """
    # 1. Tensor parallelism first: it replaces parameters, which breaks the tie of embedding and head.
    if mesh["tp"].size() > 1:
        _apply_tensor_parallel(model, mesh["tp"], mlp_plan or dense_mlp_plan)
        model.tie_weights()
    if adapt is not None:  # adapters are cut as the matrices are that they adapt
        adapt(model)
    layers = [layer for layer in model.model.layers if layer is not None]  # a pipeline stage has some of them
    if adapt is not None and compile.enable and _trains_first_block(model):
        # Without a gradient of its input the first block would be a graph of its own.
        model.model.embed_tokens.register_forward_hook(with_gradient)
    if model.lm_head is not None:
        # With collectives in its graph it was no faster on CPU (docs/performance.md).
        pays = mesh["tp"].size() == 1 or mesh.device_type == "cuda"
        model.lm_head.loss_function = chunked_cross_entropy(mesh["tp"].get_group(), compiled=compile.enable and pays)
    _set_attention(model, layers, context, cpu=mesh.device_type == "cpu", compiled=compile.enable)
    # 2. Recomputation and compilation. The compiler must see which operations of a block to recompute;
    # a block recomputed whole is compiled first and just run again.
    collectives = mesh["tp"].size() > 1 or context is not None
    set_memory_budget(activation_checkpoint, device_type=mesh.device_type, collectives=collectives)
    if not recomputes_operations(activation_checkpoint):
        apply_compile(layers, compile, device_type=mesh.device_type)
        apply_activation_checkpoint(layers, activation_checkpoint)
    else:
        # FSDP's hooks on a module within a block cannot be replayed operation by operation: there, whole blocks are
        # recomputed.
        hooked = [layer for layer in layers if any(module in (apart or {}) for module in layer.modules())]
        others = [layer for layer in layers if layer not in hooked]
        apply_activation_checkpoint(others, activation_checkpoint)
        apply_compile(layers, compile, device_type=mesh.device_type)
        apply_activation_checkpoint(hooked, ActivationCheckpoint(mode="full"))
    # 3. FSDP last: it gathers and frees parameters around the compiled graphs, block by block. One process has
    # nothing to gather, nor has the only one of a pipeline stage.
    alone = all(mesh[axis].size() == 1 for axis in ("dp_replicate", "fsdp", "tp"))
    if alone and activation_checkpoint.mode in ("none", "memory_budget"):
        compute_in(model, param_dtype)
        return
    embedding, head = model.model.embed_tokens, model.lm_head
    tied = embedding is not None and head is not None and head.weight is embedding.weight
    shard(
        model,
        layers,
        mesh["dp_replicate", "fsdp"],
        embedding=None if tied else embedding,
        head=None if tied else head,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        reshard_after_forward=reshard_after_forward,
        placement=placement,
        apart=apart,
    )


def _set_attention(
    model: Qwen3ForCausalLM, layers: Iterable[nn.Module], context: Context | None, *, cpu: bool, compiled: bool
) -> None:
    """Have attention in ``layers`` gather the keys of other ranks, and on CPU be computed faster."""
    chosen = on_cpu(attend) if cpu and (compiled or context is not None) else attend
    if context is not None:
        chosen = attend_from_part(chosen, context.gather)
        model.model.part = context.part
    for layer in layers:  # one function for all: a compiled graph is made for it
        assert isinstance(layer, DecoderLayer)
        layer.self_attn.attend = chosen


def _trains_first_block(model: Qwen3ForCausalLM) -> bool:
    """Whether this is the stage with the first block, and something in that is trained."""
    first = model.model.layers[0]
    return first is not None and any(parameter.requires_grad for parameter in first.parameters())


def dense_mlp_plan(_layer: DecoderLayer) -> dict[str, ParallelStyle]:
    """Gate and up split by features, down by what goes in."""
    return {
        "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }


def _apply_tensor_parallel(
    model: Qwen3ForCausalLM, tp_mesh: DeviceMesh, mlp_plan: Callable[[DecoderLayer], dict[str, ParallelStyle]]
) -> None:
    """Megatron's split of matrices (Shoeybi et al. 2019, section 3) with sequence parallelism
    (Korthikanti et al. 2022, section 4.2.2).

    Between blocks each rank holds T/tp positions of the residual stream. Attention and MLP gather
    the positions, compute a share of the heads or of the intermediate features, and scatter the sum.
    """
    # Norms over C see a part of the positions; those over D (QK-norm) a part of the heads. Their weights
    # are on the tp mesh either way, and their gradients are summed over it.
    outer: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": NormOfShard(),
        "lm_head": VocabParallelHead(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    block_plan: dict[str, ParallelStyle] = {
        "input_layernorm": NormOfShard(),
        "self_attn": PrepareModuleInput(
            input_layouts=(Shard(1), None, None, None), desired_input_layouts=(Replicate(), None, None, None)
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.q_norm": NormOfShard(),
        "self_attn.k_norm": NormOfShard(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "post_attention_layernorm": NormOfShard(),
    }
    parts = {"model.embed_tokens": model.model.embed_tokens, "model.norm": model.model.norm, "lm_head": model.lm_head}
    plan = {name: style for name, style in outer.items() if parts[name] is not None}
    for i, layer in enumerate(model.model.layers):
        if layer is not None:
            assert isinstance(layer, DecoderLayer)
            plan |= {f"model.layers.{i}.{name}": style for name, style in (block_plan | mlp_plan(layer)).items()}
    parallelize_module(model, tp_mesh, plan)
    if model.model.embed_tokens is not None:
        model.model.embed_tokens.register_forward_hook(wait_for_output)
