"""Bytes that a forward pass keeps for the backward pass. Needs no torch.

Counted operation by operation from models/qwen3/model.py; docs/planning.md derives each line.
tests/planner/test_activations.py compares them with what autograd keeps, test_traffic.py with what is kept by ranks
that share positions, heads or experts.
"""

from __future__ import annotations

import re
from collections import Counter

from torchtitan_style.models.trained import DOWN, UP

from .workload import Workload


def kept_by_layers(work: Workload) -> int:
    """Of a microbatch, by all blocks, with what ``activation_checkpoint`` says is recomputed."""
    blocks = Counter((sparse, is_recomputed(work, place)) for place, sparse in enumerate(work.blocks))
    return sum(count * _kept(work, *block) for block, count in blocks.items())


def is_recomputed(work: Workload, place: int) -> bool:
    """Whether the block at ``place`` among those of this rank is recomputed whole."""
    recompute = work.config.activation_checkpoint
    if recompute.mode != "selective":
        return recompute.mode == "full"
    if recompute.selective_ac_option == "op":  # hooks of FSDP within a block cannot be replayed by the operation
        return work.blocks[place] and work.layout.ep * work.layout.tp > 1
    return place % int(recompute.selective_ac_option) == 0


def _kept(work: Workload, sparse: bool, recomputed: bool) -> int:
    """Of one block. recomputed: the whole block."""
    recompute, inputs = work.config.activation_checkpoint, _input(work)
    if recomputed:
        return inputs
    if recompute.mode == "selective" and recompute.selective_ac_option == "op":
        return _operations(work, sparse)
    whole = kept_by_block(work, sparse)
    if recompute.mode == "memory_budget":  # a share of what is between keeping nothing and keeping all
        return inputs + int(recompute.memory_budget * max(0, whole - inputs))
    return whole


def last_block(work: Workload) -> int:
    """What the backward pass of the first block needs, whose activations are the last that are there."""
    return max((_inside(work, *block) + _kept(work, *block) for block in _blocks(work)), default=0)


def block_inside(work: Workload) -> int:
    """What the backward pass of one block needs at once and ``kept_by_layers`` does not hold: what it recomputes, and
    its gradients on the way."""
    return max((_inside(work, *block) for block in _blocks(work)), default=0)


def _blocks(work: Workload) -> set[tuple[bool, bool]]:
    """Of all blocks, which kinds there are: with experts, recomputed whole."""
    return {(sparse, is_recomputed(work, place)) for place, sparse in enumerate(work.blocks)}


def _inside(work: Workload, sparse: bool, recomputed: bool) -> int:
    again = max(0, kept_by_block(work, sparse) - _kept(work, sparse, recomputed))
    # The residual's gradient and the norm's, which is taken in fp32.
    gradients = work.tokens * work.c * work.hidden + work.scattered_tokens * 8 * work.hidden
    if sparse:  # gradients of the product and of both factors, and of the rows on both sides
        gradients += work.rows * work.c * (3 * work.model.moe_intermediate_size + 2 * work.hidden)
    else:  # gradients of the product and of both factors
        gradients += work.tokens * work.c * 3 * work.features
    if work.layout.cp > 1:  # gradients of the gathered keys and values, and in the order in which they are sent
        gradients += 2 * gathered_keys(work)
    return again + int(gradients)


def kept_by_block(work: Workload, sparse: bool = False) -> int:
    """Of a block of which nothing is recomputed (by us: the compiler does some by itself). sparse: it has experts."""
    n, local, c = work.tokens, work.scattered_tokens, work.c
    q, kv, hidden = work.queries, work.keys, work.hidden
    # The input of q, k and v, if one of them has a gradient.
    inputs = n * c * hidden * _keeps_input(work, "[qkv]")
    roots = 4 * (2 * local + n * (work.heads + kv / work.model.head_dim))  # of the four norms, fp32
    kept = roots + 4 * n * work.heads  # and attention's log of the sum of exponentials
    if work.compiled:
        # Block input and middle of the residual stream; input of q, k, v; before and after QK-norm and rotation; v;
        # attention's output.
        kept += local * 2 * c * hidden + inputs + n * c * (3 * q + 3 * kv)
    else:
        # Norms over C: the input in fp32 and the normalised rows; the output, which the ranks of tp gather.
        normalised = c * any(kind.trained and kind.in_block and "norm" in kind.name for kind in work.kinds)
        kept += local * 2 * (4 + normalised) * hidden + inputs
        # QK-norm alike, and after the rotation; v; attention's output.
        kept += n * ((4 + normalised + c) * (q + kv) + c * kv + c * q)
    kept += _kept_by_experts(work) if sparse else _kept_by_mlp(work)
    if work.on_gpu and c == 4:  # the kernel for fp32 wants keys and values for each query head
        kept += 2 * n * c * (q - kv)
    if work.model.dropout:  # a mask for each branch: of bytes on a GPU
        kept += 2 * local * hidden * (1 if work.on_gpu else c)
    for rank, width in work.adapters:
        kept += n * c * rank  # what is between its two matrices
        if work.config.lora.dropout:  # its input after that, and a mask
            kept += n * width * (c + (1 if work.on_gpu else c))
    if work.layout.cp > 1:  # keys and values of whole rows instead of this rank's, and the spans' outputs put together
        kept += gathered_keys(work) - 2 * n * c * kv + n * c * q
    fast = work.compiled and c == 2  # attention of our own (cpu/attention.py), which keeps none
    if not work.on_gpu and not fast:  # the mask that is added to the scores
        kept += _scores(work) * c
    return int(kept)


def _kept_by_mlp(work: Workload) -> float:
    """Of a dense MLP: its input and that of down, if the matrices have gradients; gate and up and, not compiled,
    silu(gate)."""
    n, c = work.tokens, work.c
    inputs = n * c * (work.hidden * _keeps_input(work, "gate", "up") + work.features * _keeps_input(work, "down"))
    return inputs + n * c * (2 if work.compiled else 3) * work.features


def _kept_by_experts(work: Workload) -> float:
    """Of the router and the experts of a block."""
    tokens, rows, c, width = work.scattered_tokens, work.rows, work.c, work.model.moe_intermediate_size
    experts, chosen = work.model.num_experts, work.model.num_experts_per_tok
    # The router's input; of the chosen experts the number and the weight; normalisers.
    kept = tokens * (c * work.hidden + chosen * (8 + 4) + 8)
    if work.compiled:  # its logits
        kept += tokens * (c * experts + 4)
    else:  # in fp32 its logits and two softmaxes; the weights normalised
        kept += tokens * (12 * experts + chosen * c)
    # Rows as the experts are given them, gate and up, the product, the results; their order, there and back.
    kept += rows * (c * (2 * work.hidden + 3 * width) + 2 * 8)
    if work.layout.ep > 1:  # the order in which rows arrive and are sent back
        kept += rows * 2 * 8
    if work.layout.ep > 1 or not work.compiled:  # silu(gate); what is between exchanges is not compiled
        kept += rows * c * width
    return float(kept)


def gathered_keys(work: Workload) -> float:
    """Bytes of the keys and values of a microbatch's whole rows, on each of the tp ranks."""
    return 2 * work.tokens * work.layout.cp * work.c * work.keys


def _scores(work: Workload) -> int:
    """Entries of the mask of a microbatch on CPU; 0 where it needs none."""
    cp, rows, seq_len = work.layout.cp, work.batch.local_batch_size, work.config.training.seq_len
    documents = work.config.data.document_mask
    if cp == 1:
        return rows * seq_len**2 * documents
    # Two spans, which see as many keys together on each rank; see ``RowPart``.
    span = seq_len // (2 * cp)
    return (rows if documents else 1) * span**2 * (2 * cp + 1)


def _keeps_input(work: Workload, *projections: str) -> bool:
    """Whether one of these projections, or its adapter, needs its input in the backward pass. After dropout an adapter
    has an input of its own."""
    of_these = re.compile(rf"\.({'|'.join(projections)})_proj\.")
    found = [kind for kind in work.kinds if kind.trained and of_these.search(kind.name)]
    dropped = work.config.lora.dropout > 0
    return any(not kind.name.endswith((DOWN, UP)) or (kind.name.endswith(DOWN) and not dropped) for kind in found)


def _input(work: Workload) -> int:
    """A block's input, all that is kept of a block that is recomputed whole."""
    return int(work.scattered_tokens * work.c * work.hidden)


def _operations(work: Workload, sparse: bool) -> int:
    """The input, and the outputs of matrix multiplications and attention."""
    n, c = work.tokens, work.c
    kept = n * c * (2 * work.queries + 2 * work.keys + work.hidden) + 4 * n * work.heads
    if work.on_gpu and work.config.data.document_mask and not work.compiled:
        kept += n * c * (work.queries + 2 * work.keys)  # FlexAttention by itself: all that its gradient needs
    if sparse:  # the router's logits, and the two products of each row
        kept += work.scattered_tokens * c * work.model.num_experts
        kept += work.rows * c * (2 * work.model.moe_intermediate_size + work.hidden)
    else:
        kept += n * c * (work.hidden + 2 * work.features)
    if work.layout.tp > 1:  # the two sums over the ranks beside their addends
        kept += work.scattered_tokens * c * 2 * work.hidden
    return _input(work) + int(kept)


def kept_outside(work: Workload) -> int:
    """Token ids, rotary cosines and sines, the last norm."""
    seq_len = work.config.training.seq_len // work.layout.cp
    documents, cp = work.config.data.document_mask, work.layout.cp
    rows = work.batch.local_batch_size if documents or cp > 1 else 1  # whose positions differ, or are given
    angles = 2 * rows * seq_len * work.model.head_dim * work.c
    norm = work.scattered_tokens * ((4 + work.c) * work.hidden + 4)
    masks = _scores(work) if documents and not work.on_gpu else 0
    return int(8 * work.tokens + angles + norm + masks)
