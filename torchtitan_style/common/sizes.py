"""Byte arithmetic that several parts of the program share. Needs no torch.

What a run allocates and what ``plan`` predicts come from the same functions.
"""

from __future__ import annotations

FP32 = 4
"""Bytes of a number of master weights, gradients and optimizer state."""

LOGITS_PER_CHUNK = 2**23
"""Logits held at once, on each rank: 16 MiB in bf16."""

MIN_TOKENS_PER_CHUNK = {"cpu": 512, "cuda": 2048}
"""However large the vocabulary. Each chunk adds to the gradient of the whole matrix in fp32, which on CPU takes a fifth
of the time of the multiplications at 512 tokens (measured: docs/performance.md). By the data sheet of an H100, whose
multiplications are faster beside its memory, it would be two thirds at 512 tokens and a sixth at 2048, where the logits
of Qwen3's vocabulary are 0.6 GB."""


def logits_rows(tokens: int, vocabulary: int, *, most_logits: int, least_rows: int) -> int:
    """Rows of the logits that the chunked loss holds at once, for ``vocabulary`` rows of the head on a rank."""
    most = max(least_rows, most_logits // vocabulary)
    chunks = max(1, -(-tokens // most))
    return -(-tokens // chunks)


def local_shape(
    shape: tuple[int, ...], *, tp: int = 1, tp_dim: int | None = None, fsdp: int = 1, fsdp_dim: int = 0, index: int = 0
) -> tuple[int, ...]:
    """The part of a parameter that one rank holds.

    Tensor parallelism splits ``tp_dim`` evenly (None: it does not split). FSDP2 then cuts ``fsdp_dim`` as
    ``torch.chunk`` does: the first ranks hold ceil(rows / fsdp) rows, the last ones fewer or none. index: of the
    rank among the fsdp ranks.
    """
    sizes = list(shape)
    if tp_dim is not None:
        sizes[tp_dim] //= tp
    rows = -(-sizes[fsdp_dim] // fsdp)
    sizes[fsdp_dim] = max(0, min(rows, sizes[fsdp_dim] - index * rows))
    return tuple(sizes)


def expert_shard_dim(shape: tuple[int, ...], *, ep: int, shards: int) -> int:
    """Along which dimension FSDP cuts the experts of one rank of ``ep``: between two of them where ``shards`` divides
    their number, or else within each. shape: of the stack of all experts of a layer."""
    if (shape[0] // ep) % shards == 0:
        return 0
    return next((dim for dim in (1, 2) if shape[dim] % shards == 0), 0)


def generation_bytes(
    *, parameters: int, head: int, packed: int, number_bytes: int, ranks: int, sharing: int = 1
) -> int:
    """Bytes of the weights of a model that generates text, on the device or host that holds them.

    head: numbers of a tied head, which becomes a matrix of its own once it is packed. packed: numbers that are kept
    a second time, in another order. ranks: that split the model; sharing: of them, on one memory.
    """
    return (parameters + head + packed) * number_bytes * sharing // ranks
