"""What a rank sends in a step, by axis of the mesh and kind of collective. Needs no torch.

Bytes are those of the whole tensor that a collective makes (all-gather) or takes (reduce-scatter, all-reduce), as NCCL
counts them. Each rank of n sends (n - 1) / n of them, twice as much for an all-reduce.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchtitan_style.common.sizes import FP32
from torchtitan_style.config.layout import reduces_each_microbatch

from .activations import gathered_keys
from .workload import Workload


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind along one axis, in one phase of the step."""

    axis: str
    """"fsdp", "dp_replicate", "cp", "tp", "pp", or "world": all, or all of a pipeline stage."""
    kind: str
    """"all-gather", "reduce-scatter", "all-reduce", "all-to-all", or "send" to one rank."""
    phase: str
    """"forward", "loss", "backward": of each microbatch. "reduce": beside the last backward pass. "optimizer"."""
    bytes: int
    """Of all of them, in each microbatch if the phase is in each."""
    count: int
    hides: bool
    """Whether it can run beside computation; tensor parallelism waits for its results."""

    def per_step(self, microbatches: int) -> int:
        return self.bytes * (microbatches if self.phase in ("forward", "loss", "backward") else 1)


def traffic_of(work: Workload) -> list[Traffic]:
    """Everything that is sent in a step but for a few numbers (the loss, the norm)."""
    found = [*_sharding(work), *_tensor_parallel(work), *_context_parallel(work), *_pipeline(work), *_muon(work)]
    return [each for each in found if each.bytes]


def _sharding(work: Workload) -> list[Traffic]:
    """FSDP2: gather before use, sum gradients after each microbatch or the last; replicas after the last."""
    layout, layers = work.layout, work.layers
    blocks, outer = layers * work.block_numbers, work.outer_numbers
    trained = layers * work.trained_block_numbers + work.trained_outer_numbers
    found = []
    if layout.fsdp > 1:
        # A pipeline that does not free parameters gathers them once a step.
        when = "reduce" if work.stages and work.keeps_gathered else "forward"
        found.append(Traffic("fsdp", "all-gather", when, (blocks + outer) * work.c, layers + 1, True))
        if not work.keeps_gathered:  # the outer parameters stay
            found.append(Traffic("fsdp", "all-gather", "backward", blocks * work.c, layers, True))
        found.append(Traffic("fsdp", "reduce-scatter", _when_reduced(work), trained * work.r, layers + 1, True))
    if layout.dp_replicate > 1:
        shard = -(-trained // layout.fsdp)
        found.append(Traffic("dp_replicate", "all-reduce", "reduce", shard * work.r, layers + 1, True))
    return found


def _when_reduced(work: Workload) -> str:
    """The phase in which FSDP sums the gradients of what it shards."""
    return "backward" if reduces_each_microbatch(work.config.parallelism, work.layout) else "reduce"


def _tensor_parallel(work: Workload) -> list[Traffic]:
    """Megatron's sequence parallelism: attention and MLP gather the positions and scatter the sums, and the other way
    round in the backward pass. docs/planning.md has the counts."""
    if work.layout.tp == 1:
        return []
    layers, rows = work.layers, work.tokens * work.c * work.hidden
    again = _recomputed_blocks(work)
    # Of what each rank has whole: norms, and the factor of each adapter that is not split.
    whole = [k for k in work.kinds if k.trained and k.tp_dim is None and not k.name.endswith("bias")]
    norms = sum(k.count * math.prod(k.shape) for k in whole)
    return [
        # embedding → scatter; two gathers and two scatters in a block; the head gathers
        Traffic("tp", "all-gather", "forward", 2 * layers * rows, 2 * layers, False),
        Traffic("tp", "reduce-scatter", "forward", (2 * layers + 1) * rows, 2 * layers + 1, False),
        Traffic("tp", "all-gather", "loss", rows, 1, False),
        Traffic("tp", "reduce-scatter", "loss", rows, 1, False),
        Traffic("tp", "all-reduce", "loss", 3 * FP32 * work.tokens, 2, False),
        Traffic(
            "tp", "all-gather", "backward", (2 * (layers + again[0]) + 1) * rows, 2 * (layers + again[0]) + 1, False
        ),
        Traffic("tp", "reduce-scatter", "backward", (2 * layers + again[1]) * rows, 2 * layers + again[1], False),
        Traffic("tp", "all-reduce", _when_reduced(work), norms * work.c, sum(k.count for k in whole), False),
    ]


def _context_parallel(work: Workload) -> list[Traffic]:
    """Keys and values of whole rows, gathered in each block, and their gradients summed back. Where a block
    is computed again, so is the gather."""
    if work.layout.cp == 1:
        return []
    layers, again = work.layers, _recomputed_blocks(work)[0]
    rows = int(gathered_keys(work))
    return [
        Traffic("cp", "all-gather", "forward", layers * rows, layers, False),
        Traffic("cp", "all-gather", "backward", again * rows, again, False),
        Traffic("cp", "reduce-scatter", "backward", layers * rows, layers, False),
    ]


def _recomputed_blocks(work: Workload) -> tuple[int, int]:
    """Blocks whose gathers are done again in the backward pass, and scatters: the last of a block is not needed."""
    recompute, layers = work.config.activation_checkpoint, work.layers
    if recompute.mode == "full":
        return layers, layers
    if recompute.mode == "selective" and recompute.selective_ac_option != "op":
        again = -(-layers // int(recompute.selective_ac_option))
        return again, again
    if recompute.mode == "selective":
        return layers, 0
    return 0, 0


def _pipeline(work: Workload) -> list[Traffic]:
    """Hidden states to the next stage and their gradients back; of a tied embedding the weights to the last stage, and
    its gradient to the first."""
    hidden = int(work.scattered_tokens * work.c * work.hidden)
    ends = work.stages[0].is_first + work.stages[-1].is_last if work.stages else 0
    tied = ends == 1 and work.model.tie_word_embeddings
    embedding = work.model.vocab_size * work.hidden * FP32 // (work.layout.tp * work.layout.fsdp)
    return [
        Traffic("pp", "send", "forward", work.sent_forward * hidden, work.sent_forward, False),
        Traffic("pp", "send", "backward", work.sent_backward * hidden, work.sent_backward, False),
        Traffic("pp", "send", "optimizer", tied * embedding, 1, False),
    ]


def _muon(work: Workload) -> list[Traffic]:
    """Each matrix goes to the rank that makes it orthogonal, and its parts come back."""
    numbers = sum(kind.count * math.prod(kind.shape) for kind in work.kinds if kind.muon)
    if work.stage_ranks == 1 or not numbers:
        return []
    # Of all matrices each rank owns its share, and holds its share; both go through it once.
    owned = numbers // work.stage_ranks
    held = numbers // (work.layout.fsdp * work.layout.tp)
    return [Traffic("world", "all-to-all", "optimizer", (owned + held) * work.c, 2 * work.layers, False)]
