"""Qwen3 laid out for generating text: split over ranks, its matrices fused and packed.

Training's layout does not suit it: sequence parallelism splits the positions, and a new token is one position.
Here each rank holds some of the heads and of the intermediate features, and two sums over the ranks per block
make its output whole (Shoeybi et al. 2019, section 3). ``split`` comes before the weights are loaded, under the
model's own names, and ``fuse`` after it.

A token's time is at best that of reading every weight once. What keeps it from that on CPU are many small
operations, and bf16 matrices in an order that oneDNN has to undo each time (measured: docs/generation.md).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.attention.flex_attention import BlockMask

from torchtitan_style.common.device import fastest_dtype
from torchtitan_style.distributed.local import local_tensor

from .attention import attend
from .config import Qwen3Config
from .model import MLP, Cache, DecoderLayer, Qwen3ForCausalLM, RMSNorm, loss_of_logits
from .rotary import apply_rotary

replays = True
"""Whether a step of decoding can be recorded on a GPU, and replayed."""


def split_problem(config: Qwen3Config, ranks: int) -> str | None:
    """Why a model of ``config`` cannot be split over so many ranks, or None if it can."""
    return uneven(config, ("num_key_value_heads", "intermediate_size", "vocab_size"), ranks)


def uneven(config: Qwen3Config, names: Iterable[str], ranks: int) -> str | None:
    """That so many ranks cannot share one of these dimensions; None if they can."""
    for name in names:
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


def fuse(model: Qwen3ForCausalLM, *, group: dist.ProcessGroup | None = None, compile: bool = False) -> None:
    """Fewer and larger operations, in place: the same sums of the same numbers, for inference only.

    The model is called as before, with a cache or without.

    group: the ranks that ``split`` has split the model over. compile: whether the model is going to be compiled: for
    one row a compiler reads matrices that are not packed, so they are kept as they were too. The parameters' names are
    gone afterwards.
    """
    model.requires_grad_(False)
    for i, layer in enumerate(model.model.layers):
        assert isinstance(layer, DecoderLayer)
        model.model.layers[i] = _Layer(layer, group, compile)
    model.model.norm = _Norm(model.model.norm)  # type: ignore[assignment]
    model.model.dropout = nn.Identity()  # type: ignore[assignment]
    model.lm_head = Head(model.lm_head, group, compile)  # type: ignore[assignment]
    if group is not None:
        model.model.embed_tokens = SplitEmbedding(model.model.embed_tokens, group)  # type: ignore[assignment]


_PARTS = 4
"""Parts of a matrix that are read side by side (measured: docs/generation.md)."""


class _Matrix:
    """One or several linear layers of the same input as one, its output added up over ``group``."""

    def __init__(self, *linears: nn.Linear, group: dist.ProcessGroup | None = None, compile: bool = False) -> None:
        self.group = group
        self.weight = torch.cat([local_tensor(linear.weight) for linear in linears]).detach()
        self.dense = self.weight if compile and self.weight.device.type == "cpu" else None
        biases = [local_tensor(linear.bias) for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases).detach() if biases else None
        if self.bias is not None and group is not None and dist.get_rank(group) > 0:
            self.bias.zero_()  # it is added once
        self.packed = packs(self.weight.dtype, self.weight.device)
        if self.packed:  # the second argument, the rows that the order is best for, hardly matters
            self.size, self.number = self.weight.shape[0], next(_numbers)
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, 8)
            _packed_weights[self.number] = self.weight

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor
        if torch.compiler.is_compiling() and self.dense is not None and x.shape[:-1].numel() == 1:
            y = _product(x, self.dense)
            y = y if self.bias is None else y + self.bias
        elif torch.compiler.is_compiling() and self.packed:
            y = torch.ops.torchtitan_style.packed_linear(x, self.bias, self.number, self.size)
        elif self.packed:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        else:
            y = F.linear(x, self.weight, self.bias)
        if self.group is not None:
            dist.all_reduce(y, group=self.group)
        return y


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [1, 1, C] times weight [O, C] transposed, as sums that a compiler fuses with what is before and after.

    The matrix is read as several parts side by side: one sum waits for each of its additions, and memory for one
    address after the other, and with four of both a core reads bf16 up to twice as fast.
    """
    parts = _PARTS if weight.shape[0] % _PARTS == 0 else 1
    row = x.flatten().float()
    sums = [(row * part.float()).sum(-1) for part in weight.view(parts, -1, weight.shape[1])]
    return torch.cat(sums).to(x.dtype).view(1, 1, -1)


# A compiler cannot read packed matrices: its graph has an operation that takes one's number instead.
_packed_weights: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
_numbers = itertools.count()
_library = torch.library.Library("torchtitan_style", "DEF")
_library.define("packed_linear(Tensor x, Tensor? bias, int number, int size) -> Tensor")


@torch.library.impl(_library, "packed_linear", "CPU")
def _packed_linear(x: Tensor, bias: Tensor | None, number: int, size: int) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, _packed_weights[number], bias, "none", [], "")
    return y


@torch.library.register_fake("torchtitan_style::packed_linear")
def _packed_linear_shape(x: Tensor, bias: Tensor | None, number: int, size: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], size)


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrices of ``dtype`` are reordered by oneDNN once and for all.

    On a CPU that computes in bf16 these are bf16 ones. On any other they are fp32 ones, which MKL multiplies with a few
    rows at a half to a third of the speed there (measured: docs/generation.md).
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == fastest_dtype(device) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class _Norm(nn.Module):
    """RMSNorm in one call."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.shape, self.eps = norm.weight, list(norm.weight.shape), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, self.shape, self.weight, self.eps)


class _Layer(nn.Module):
    """``DecoderLayer`` with one matrix for q, k and v, whose heads are normalised and rotated together, and one for
    gate and up. Nothing in it is a module of its own: at one token that costs more than most of the arithmetic."""

    def __init__(self, layer: DecoderLayer, group: dist.ProcessGroup | None, compile: bool) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        assert isinstance(mlp, MLP)
        self.layer, self.head_dim, self.eps = attention.layer, attention.head_dim, attention.q_norm.eps
        rows = (local_tensor(linear.weight).shape[0] for linear in (attention.q_proj, attention.k_proj))
        self.queries, self.keys = (count // self.head_dim for count in rows)  # H, K
        self.input_norm, self.post_norm = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.qkv_proj = _Matrix(attention.q_proj, attention.k_proj, attention.v_proj, compile=compile)
        norms = (attention.q_norm.weight.expand(self.queries, -1), attention.k_norm.weight.expand(self.keys, -1))
        self.qk_norm = torch.cat(norms)  # [H + K, D]
        self.o_proj = _Matrix(attention.o_proj, group=group, compile=compile)
        self.gate_up_proj = _Matrix(mlp.gate_proj, mlp.up_proj, compile=compile)
        self.down_proj = _Matrix(mlp.down_proj, group=group, compile=compile)
        self.compiles = compile and self.qk_norm.is_cuda
        """Whether it is compiled for a cache that has places, one graph for all layers; on CPU all of a step is one."""

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | BlockMask | None = None,
        *,
        cache: Cache | None = None,
    ) -> Tensor:
        place = getattr(cache, "place", None) if self.compiles else None
        if place is not None:
            return _compiled_step()(self, x, cos, sin, *place(self.layer))
        q, k, v = _before_cache(self, x, cos, sin)
        if cache is not None:
            k, v, mask = cache.update(self.layer, k, v)
        return _after_cache(self, x, q, k, v, mask)


def _before_cache(layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x: [B, T, C]. → q [B, H, T, D], k and v [B, K, T, D], normalised and rotated."""
    b, t, _ = x.shape
    y = layer.qkv_proj(layer.input_norm.forward(x)).view(b, t, -1, layer.head_dim)  # [B, T, H + 2K, D]
    qk = torch.rms_norm(y[:, :, : layer.queries + layer.keys], [layer.head_dim], None, layer.eps) * layer.qk_norm
    q, k = apply_rotary(qk, cos, sin).transpose(1, 2).split((layer.queries, layer.keys), dim=1)
    return q, k, y[:, :, layer.queries + layer.keys :].transpose(1, 2)


def _after_cache(layer: _Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """x: [B, T, C]; q: [B, H, T, D]; k, v: [B, K, S, D]; mask: as for ``attend``. → [B, T, C]"""
    x = x + layer.o_proj(_attend(q, k, v, mask))
    gate, up = layer.gate_up_proj(layer.post_norm.forward(x)).chunk(2, dim=-1)
    return x + layer.down_proj(F.silu(gate) * up)


def _layer_step(
    layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor, mask: Tensor
) -> Tensor:
    """A new token of each row. x: [B, 1, C]; keys, values: [B, K, S, D], written to at ``slot`` [1]; mask:
    [B, 1, 1, S]. → [B, 1, C]"""
    q, k, v = _before_cache(layer, x, cos, sin)
    keys.index_copy_(2, slot, k)
    values.index_copy_(2, slot, v)
    return _after_cache(layer, x, q, keys, values, mask)


@functools.cache
def _compiled_step() -> Callable[..., Tensor]:
    """``_layer_step``, compiled once for all layers and any number of slots: for one row, and for several.

    For one row a matrix product is a sum, which a tuned kernel reads the matrix for at the memory's full rate.
    """
    for_one = torch.compile(_layer_step, options={"coordinate_descent_tuning": True})
    for_several = torch.compile(_layer_step)

    def call(layer: _Layer, *tensors: Tensor) -> Tensor:
        rows, slots = tensors[0].shape[0], tensors[-1].shape[-1]
        for x in tensors:
            changing = [
                i for i, size in enumerate(x.shape) if (i == 0 and 1 < size == rows) or (i > 1 and size == slots)
            ]
            torch._dynamo.maybe_mark_dynamic(x, changing)
        y: Tensor = (for_one if rows == 1 else for_several)(layer, *tensors)
        return y

    return call


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """q: [B, H, T, D]; k, v: [B, K, S, D]; mask: as for ``attend``. → [B, T, H·D]"""
    b, _, t, _ = q.shape
    if t == 1 and q.is_cuda and isinstance(mask, Tensor) and torch.compiler.is_compiling():
        return attend_by_sums(q, k, v, mask)
    if t == 1 and not isinstance(mask, BlockMask) and (q.dtype == torch.float32 or (q.is_cuda and mask is not None)):
        # The heads of a key as rows of one matrix. On CPU a third to a half faster in fp32, and slower in bf16. On CUDA
        # the kernel that takes a mask takes no fewer keys than queries.
        y = F.scaled_dot_product_attention(q.reshape(b, k.shape[1], -1, q.shape[3]), k, v, attn_mask=mask)
        return y.reshape(b, 1, -1)
    return attend(q, k, v, mask).transpose(1, 2).reshape(b, t, -1)


def attend_by_sums(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one query a head, for a compiler: torch's kernels leave most of a GPU idle with one query.

    q: [B, H, 1, D]; k, v: [B, K, S, D]; mask: [B, 1, 1, S]. → [B, 1, H·D]"""
    b, _, _, d = q.shape
    q = q.view(b, k.shape[1], -1, 1, d).float() * d**-0.5  # [B, K, H / K, 1, D]
    scores = (q * k[:, :, None].float()).sum(-1).masked_fill(~mask, -math.inf)  # [B, K, H / K, S]
    y = (scores.softmax(-1)[..., None] * v[:, :, None].float()).sum(-2)  # [B, K, H / K, D]
    return y.to(v.dtype).view(b, 1, -1)


class SplitEmbedding(nn.Module):
    """Each rank looks up the tokens it has; the sum has them all."""

    def __init__(self, embedding: nn.Embedding, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.group = local_tensor(embedding.weight), group
        self.first = dist.get_rank(group) * self.weight.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids - self.first
        mine = (ids >= 0) & (ids < self.weight.shape[0])
        x = F.embedding(ids.where(mine, 0), self.weight) * mine[..., None]  # [B, T, C]
        dist.all_reduce(x, group=self.group)
        return x


class Head(nn.Module):
    """Logits, the ranks' parts of the vocabulary joined, or, given labels, the loss."""

    def __init__(self, head: nn.Linear, group: dist.ProcessGroup | None, compile: bool) -> None:
        super().__init__()
        self.matrix, self.group = _Matrix(head, compile=compile), group

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        logits = self._logits(hidden)
        return logits if labels is None else loss_of_logits(logits, labels)

    def _logits(self, hidden: Tensor) -> Tensor:
        # The last positions of a prompt's rows are far apart: one product per row, unless they are copied.
        logits: Tensor = self.matrix(hidden.contiguous())  # [B, T, V / ranks]
        if self.group is None:
            return logits
        parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, logits.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)
