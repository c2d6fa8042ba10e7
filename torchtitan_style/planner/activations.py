"""Bytes that a forward pass keeps for the backward pass. Needs no torch.

Counted operation by operation from models/qwen3/model.py; docs/planning.md derives each line, and
tests/planner/test_activations.py holds them against what autograd keeps.
"""

from __future__ import annotations

import re

from torchtitan_style.models.trained import DOWN, UP

from .workload import Workload


def kept_by_layers(work: Workload) -> int:
    """Of a microbatch, by all blocks, with what ``activation_checkpoint`` says is recomputed."""
    recompute, layers = work.config.activation_checkpoint, work.layers
    whole, inputs = kept_by_block(work), _input(work)
    if recompute.mode == "full":
        return layers * inputs
    if recompute.mode == "selective" and recompute.selective_ac_option == "op":
        return layers * _operations(work)
    if recompute.mode == "selective":
        again = -(-layers // int(recompute.selective_ac_option))
        return again * inputs + (layers - again) * whole
    if recompute.mode == "memory_budget":  # a share of what is between keeping nothing and keeping all
        return layers * int(inputs + recompute.memory_budget * max(0, whole - inputs))
    return layers * whole


def block_inside(work: Workload) -> int:
    """What the backward pass of one block needs at once and ``kept_by_layers`` does not hold: what it recomputes, and
    its gradients on the way."""
    recompute = work.config.activation_checkpoint
    whole = kept_by_block(work)
    again = 0
    if recompute.mode == "selective" and recompute.selective_ac_option == "op":
        again = max(0, whole - _operations(work))
    elif recompute.mode in ("full", "selective"):
        again = whole - _input(work)
    elif recompute.mode == "memory_budget":
        again = int((1 - recompute.memory_budget) * max(0, whole - _input(work)))
    # The MLP: gradients of the product and of both factors; the residual's and the norm's, which is taken in fp32.
    gradients = work.tokens * work.c * (3 * work.features + work.hidden) + work.scattered_tokens * 8 * work.hidden
    if work.layout.cp > 1:  # gradients of the gathered keys and values, and in the order in which they are sent
        gradients += 2 * gathered_keys(work)
    return again + int(gradients)


def kept_by_block(work: Workload) -> int:
    """Of a block of which nothing is recomputed (by us: the compiler does some by itself)."""
    n, local, c = work.tokens, work.scattered_tokens, work.c
    q, kv, hidden, features = work.queries, work.keys, work.hidden, work.features
    # Inputs of matrices that have gradients: of q, k, v and of gate, up; and of down.
    inputs = n * c * hidden * (_keeps_input(work, "[qkv]") + _keeps_input(work, "gate", "up"))
    product = n * c * features * _keeps_input(work, "down")
    roots = 4 * (2 * local + n * (work.heads + kv / work.model.head_dim))  # of the four norms, fp32
    kept = roots + 4 * n * work.heads  # and attention's log of the sum of exponentials
    if work.compiled:
        # Block input and middle of the residual stream; inputs of q, k, v and of gate, up; before and after QK-norm
        # and rotation; v; attention's output; gate, up and their product.
        kept += local * 2 * c * hidden + inputs + n * c * (3 * q + 3 * kv + 2 * features) + product
    else:
        # Norms over C: the input in fp32 and the normalised rows; their outputs, which the ranks of tp gather.
        normalised = c * any(kind.trained and kind.in_block and "norm" in kind.name for kind in work.kinds)
        kept += local * 2 * (4 + normalised) * hidden + inputs
        # QK-norm alike, and after the rotation; v; attention's output; gate, silu(gate), up and the product.
        kept += n * ((4 + normalised + c) * (q + kv) + c * kv + c * q + 3 * c * features) + product
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


def _operations(work: Workload) -> int:
    """The input, and the outputs of matrix multiplications and attention."""
    n, c = work.tokens, work.c
    products = work.queries + 2 * work.keys + 2 * work.hidden + 2 * work.features
    kept = n * c * (products + work.queries) + 4 * n * work.heads
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
