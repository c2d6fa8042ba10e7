"""Qwen3 laid out for generating text: split over ranks, its matrices fused and packed.

Training's layout does not suit it: sequence parallelism splits the positions, and a new token is one position.
Here each rank holds some of the heads and of the intermediate features, and two sums over the ranks per block
make its output whole (Shoeybi et al. 2019, section 3). ``split`` comes before the weights are loaded, under the
model's own names, and ``fuse`` after it.

A token's time is at best that of reading every weight once. What keeps it from that on CPU are many small
operations, and bf16 matrices in an order that oneDNN has to undo each time (measured: docs/generation.md).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .config import Qwen3Config
from .model import MLP, Attention, LMHead, Qwen3ForCausalLM, RMSNorm, apply_rotary

__all__ = ["fuse", "split", "split_problem"]


def split_problem(config: Qwen3Config, ranks: int) -> str | None:
    """Why a model of ``config`` cannot be split over so many ranks, or None if it can."""
    for name in ("num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % ranks:
            return f"{ranks} ranks cannot share the model's {name} of {getattr(config, name)} evenly"
    return None


def split(model: Qwen3ForCausalLM, mesh: DeviceMesh) -> None:
    """Make parameters of ``model``, on the meta device, DTensors over ``mesh``: each rank then loads its own part."""
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")):
            dims = {"weight": 0, "bias": 0}  # heads, features, tokens: what comes out
        elif name.endswith(("o_proj", "down_proj")):
            dims = {"weight": 1}  # what goes in
        else:
            continue
        for key, dim in dims.items():
            if isinstance(parameter := getattr(module, key, None), Tensor):
                sharded = distribute_tensor(parameter, mesh, [Shard(dim)])
                setattr(module, key, nn.Parameter(sharded, requires_grad=False))
    model.tie_weights()


def fuse(model: Qwen3ForCausalLM, *, group: dist.ProcessGroup | None = None) -> None:
    """Fewer and larger operations, in place: the same sums of the same numbers, for inference only.

    group: the ranks that ``split`` has split the model over. The parameters' names are gone afterwards.
    """
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Attention):
                setattr(parent, name, _Attention(module, group))
            elif isinstance(module, MLP):
                setattr(parent, name, _MLP(module, group))
            elif isinstance(module, RMSNorm):
                setattr(parent, name, _Norm(module))
            elif isinstance(module, LMHead):
                setattr(parent, name, _Head(module, group))
            elif isinstance(module, nn.Embedding) and group is not None:
                setattr(parent, name, _Embedding(module, group))


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class _Matrix(nn.Module):
    """One or several linear layers of the same input as one, its output added up over ``group``."""

    def __init__(self, *linears: nn.Linear, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group
        weight = torch.cat([_local(linear.weight) for linear in linears]).detach()
        biases = [_local(linear.bias) for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases).detach() if biases else None
        if self.bias is not None and group is not None and dist.get_rank(group) > 0:
            self.bias = torch.zeros_like(self.bias)  # it is added once
        self.packed = _can_pack(weight)
        # The second argument is the number of rows that the order is best for. It hardly matters.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 8) if self.packed else weight

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        else:
            y = F.linear(x, self.weight, self.bias)
        if self.group is not None:
            dist.all_reduce(y, group=self.group)
        return y


def _can_pack(weight: Tensor) -> bool:
    """Whether oneDNN reorders this matrix: bf16 on a CPU that computes in it. fp32 gains nothing at one row."""
    ops = torch.ops.mkldnn
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(ops, "_reorder_linear_weight")
        and ops._is_mkldnn_bf16_supported()
    )


class _Norm(nn.Module):
    """RMSNorm in one operation."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Attention(Attention):
    """Attention with one matrix for q, k and v; their heads are normalised and rotated together."""

    def __init__(self, attention: Attention, group: dist.ProcessGroup | None) -> None:
        nn.Module.__init__(self)
        self.layer, self.head_dim, self.window = attention.layer, attention.head_dim, attention.window
        self.attention_dropout, self.eps = 0.0, attention.q_norm.eps
        self.qkv_proj = _Matrix(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = _Matrix(attention.o_proj, group=group)  # type: ignore[assignment]
        self.heads = [_local(p.weight).shape[0] // self.head_dim for p in (attention.q_proj, attention.k_proj)]  # H, K
        norms = zip((attention.q_norm, attention.k_norm), self.heads, strict=True)
        self.norm = torch.cat([norm.weight.expand(heads, -1) for norm, heads in norms])  # [H + K, D]

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys = self.heads
        y = self.qkv_proj(x).view(*x.shape[:2], -1, self.head_dim)  # [B, T, H + 2K, D]
        qk = F.rms_norm(y[:, :, : queries + keys], (self.head_dim,), None, self.eps) * self.norm
        qk = apply_rotary(qk, cos, sin)
        return qk[:, :, :queries], qk[:, :, queries:], y[:, :, queries + keys :]


class _MLP(nn.Module):
    """SwiGLU with one matrix for gate and up."""

    def __init__(self, mlp: MLP, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.gate_up_proj = _Matrix(mlp.gate_proj, mlp.up_proj)
        self.down_proj = _Matrix(mlp.down_proj, group=group)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class _Embedding(nn.Module):
    """Each rank looks up the tokens it has; the sum has them all."""

    def __init__(self, embedding: nn.Embedding, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.group = _local(embedding.weight), group
        self.first = dist.get_rank(group) * self.weight.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids - self.first
        mine = (ids >= 0) & (ids < self.weight.shape[0])
        x = F.embedding(ids.where(mine, 0), self.weight) * mine[..., None]  # [B, T, C]
        dist.all_reduce(x, group=self.group)
        return x


class _Head(nn.Module):
    """Logits, the ranks' parts of the vocabulary joined."""

    def __init__(self, head: nn.Linear, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.matrix, self.group = _Matrix(head), group

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is None
        logits: Tensor = self.matrix(hidden)  # [B, T, V / ranks]
        if self.group is None:
            return logits
        parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, logits.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)
