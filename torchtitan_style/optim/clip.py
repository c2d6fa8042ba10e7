"""Gradient clipping by global norm, whatever the mesh of each gradient."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, *, beside: Tensor | None = None) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most ``max_norm`` (Pascanu et al. 2013).

    Returns the norm before scaling, a 0-dim tensor on the device, the same on every rank. Squares are
    summed in fp64: in fp32 the sum depends on how the gradients are cut (by 6e-4 at 17 M elements).
    beside: a number, 0-dim fp64, that is summed over all ranks on the way, in place.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
    # For all of them at once: one by one they are thousands of small kernels in a deep model.
    squares = torch._foreach_pow(torch._foreach_norm(local, 2, dtype=torch.float64), 2)
    # Each rank adds what it holds; what several ranks hold counts once.
    total = torch.stack(torch._foreach_div(squares, [float(_copies(grad)) for grad in grads])).sum()
    if dist.is_initialized():
        sums = torch.stack([total] if beside is None else [total, beside])
        dist.all_reduce(sums)
        total = sums[0]
        if beside is not None:
            beside.copy_(sums[1])
    norm = total.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(local, factor.float())
    return norm.float()


def _copies(grad: Tensor) -> int:
    """How many ranks hold the same piece of ``grad``."""
    if not isinstance(grad, DTensor):
        return dist.get_world_size() if dist.is_initialized() else 1
    mesh = grad.device_mesh
    copies = dist.get_world_size() // mesh.size()
    for dim, placement in enumerate(grad.placements):
        assert not placement.is_partial(), "FSDP reduces every gradient"
        if isinstance(placement, Replicate):
            copies *= mesh.size(dim)
    return copies
