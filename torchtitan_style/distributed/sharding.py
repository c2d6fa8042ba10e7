"""FSDP2: parameters, gradients and optimizer state sharded over the data-parallel ranks.

Zhao et al. 2023, "PyTorch FSDP". Each wrapped module gathers its parameters in the compute type
before it runs, and sums its gradients over ranks afterwards. A single process that does not recompute blocks has
nothing to gather or to sum: there ``compute_in`` makes the change of type alone, which costs less.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils.stateless import _reparametrize_module

from torchtitan_style.common.device import available_memory
from torchtitan_style.common.program import environment_number

_resharding: WeakKeyDictionary[nn.Module, torch.dtype] = WeakKeyDictionary()
"""Modules whose parameters are freed after each forward pass, and the type that they are gathered in."""


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
    embedding: nn.Module | None = None,
    head: nn.Module | None = None,
    placement: Callable[[nn.Parameter], Shard | None] | None = None,
    apart: Mapping[nn.Module, DeviceMesh] | None = None,
) -> None:
    """Shard ``blocks`` one by one, and what is left of ``model`` as a last group, in place.

    mesh: axes (dp_replicate, fsdp). embedding, head: where these have a matrix each, to be gathered one by one: the
    first block does not wait for the head's, and the sum of its gradient runs beside the blocks. placement: which
    dimension of a parameter to cut; None: the first. apart: modules in the blocks whose parameters are sharded over a
    mesh of their own.

    Gradients are summed in ``reduce_dtype`` and kept in fp32. They are plain sums over the ranks: the loss is divided
    by the global number of tokens beforehand, so FSDP must not average.
    """
    replicate = mesh.size(0)
    fsdp_mesh = mesh if replicate > 1 else mesh["fsdp"]
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
        "shard_placement_fn": placement,
    }
    parts = {module: fsdp_mesh for module in (*blocks, embedding) if module is not None}
    for module, its_mesh in {**(apart or {}), **parts}.items():
        fully_shard(module, mesh=its_mesh, reshard_after_forward=reshard_after_forward, **options)
        if reshard_after_forward:
            _resharding[module] = param_dtype
    if isinstance(embedding, FSDPModule):
        embedding.set_unshard_in_backward(False)  # its gradient does not depend on its values
    # The rest is needed last, and at once in the backward pass; an embedding that is also the head, first and last:
    # freeing it in between would gather it twice.
    for module in [model] if head is None else [head, model]:
        fully_shard(module, mesh=fsdp_mesh, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A factor of 1 needs no pre-multiplied reduction, which gloo does not have.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@contextlib.contextmanager
def kept_gathered(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Have parameters stay gathered from one forward pass to the next, if that takes no more than half of the free
    memory on any rank. For many short passes without gradients; what has stayed is the caller's to reshard.

    Called by all ranks together.
    """
    modules = [module for module in model.modules() if module in _resharding]
    needed = sum(
        _gathered_numbers(parameter) * dtype.itemsize
        for parameter, dtype in {p: _resharding[module] for module in modules for p in module.parameters()}.items()
    )
    ranks = environment_number("LOCAL_WORLD_SIZE", 1) if device.type == "cpu" else 1  # that share the memory
    fits = torch.tensor(int(needed <= available_memory(device) / ranks / 2), device=device)
    dist.all_reduce(fits, dist.ReduceOp.MIN)
    kept = [module for module in modules if isinstance(module, FSDPModule)] if fits else []
    for module in kept:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in kept:
            module.set_reshard_after_forward(True, recurse=False)


def _gathered_numbers(parameter: nn.Parameter) -> int:
    """Of a sharded parameter as FSDP gathers it: tensor and expert parallelism leave each rank its part."""
    assert isinstance(parameter, DTensor)
    names = parameter.device_mesh.mesh_dim_names or ()
    axes = zip(names, parameter.device_mesh.shape, parameter.placements, strict=True)
    return parameter.numel() // math.prod(n for name, n, how in axes if name in ("tp", "ep") and how.is_shard())


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Have ``model`` run on copies of its fp32 parameters in ``dtype``, as FSDP's mixed precision does.

    The copies are made once per forward pass, and gradients reach the fp32 parameters in fp32. Blocks
    that are recomputed in the backward pass would not find the copies: they need ``shard``.
    """
    if dtype == torch.float32:
        return
    forward = model.forward

    def forward_on_copies(*inputs: Any, **named: Any) -> Any:
        copies = {name: parameter.to(dtype) for name, parameter in model.named_parameters()}
        with _reparametrize_module(model, copies, tie_weights=True):
            return forward(*inputs, **named)

    model.forward = forward_on_copies  # type: ignore[method-assign]
