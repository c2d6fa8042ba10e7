"""What a rank sends in a step, by axis of the mesh and kind of collective. Needs no torch.

Bytes are those of the whole tensor that a collective makes (all-gather) or takes (reduce-scatter, all-reduce), as NCCL
counts them. Each rank of n sends (n - 1) / n of them, twice as much for an all-reduce.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

from torchtitan_style.common.sizes import FP32
from torchtitan_style.config.layout import reduces_each_microbatch

from .activations import gathered_keys, is_recomputed
from .workload import Workload


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind along one axis, in one phase of the step."""

    axis: str
    """"fsdp", "dp_replicate", "cp", "tp", "pp", "ep", "expert_fsdp": the ranks that the experts of one rank of ep are
    sharded over, or "world": all, or all of a pipeline stage."""
    kind: str
    """"all-gather", "reduce-scatter", "all-reduce", "all-to-all", or "send" to one rank."""
    phase: str
    """"forward", "loss", "backward": of each microbatch. "counting": of each pass that counts how often each expert is
    chosen. "reduce": beside the last backward pass. "optimizer"."""
    bytes: int
    """Of all of them, in each microbatch if the phase is in each."""
    count: int
    hides: bool
    """Whether it can run beside computation; tensor parallelism waits for its results."""

    def per_step(self, work: Workload) -> int:
        if self.phase == "counting":
            return self.bytes * work.counting_passes
        return self.bytes * (work.batch.accumulation_steps if self.phase in ("forward", "loss", "backward") else 1)


def traffic_of(work: Workload) -> list[Traffic]:
    """Everything that is sent in a step but for a few numbers (the loss, the norm)."""
    waited = [*_tensor_parallel(work), *_context_parallel(work), *_expert_parallel(work)]
    passed_on = _pipeline(work)
    found = [*_sharding(work), *waited, *passed_on, *_muon(work)]
    if work.counting_passes:  # a forward pass, with the loss's
        again = [each for each in (*waited, *passed_on) if _in_counting_pass(each)]
        found += [dataclasses.replace(each, phase="counting") for each in again]
    return [each for each in found if each.bytes]


def _in_counting_pass(each: Traffic) -> bool:
    return each.phase == "forward" or (each.phase == "loss" and each.kind != "reduce-scatter")


def _sharding(work: Workload) -> list[Traffic]:
    """FSDP2: gather before use, sum gradients after each microbatch or the last; replicas after the last."""
    layout, layers, experts = work.layout, work.layers, [kind for kind in work.kinds if kind.expert]
    if layout.ep * layout.tp == 1 or not experts:
        trained = work.trained_blocks_numbers + work.trained_outer_numbers
        return _sharded(work, "fsdp", layout.fsdp, layers, work.blocks_numbers, work.outer_numbers, trained)
    # Experts are sharded by themselves.
    apart = sum(kind.count * kind.gathered(layout) for kind in experts)
    trained_apart = sum(kind.count * kind.gathered(layout) for kind in experts if kind.trained)
    blocks = work.blocks_numbers - apart
    trained = work.trained_blocks_numbers - trained_apart + work.trained_outer_numbers
    return [
        *_sharded(work, "fsdp", layout.fsdp, layers, blocks, work.outer_numbers, trained),
        *_sharded(work, "expert_fsdp", experts[0].shards(layout), work.sparse_layers, apart, 0, trained_apart),
    ]


def _sharded(
    work: Workload, axis: str, ranks: int, layers: int, blocks: int, outer: int, trained: int
) -> list[Traffic]:
    """Of so many numbers that are sharded over ``ranks``. blocks: of all layers together; outer: of what is gathered
    once; trained: of both."""
    found, groups = [], layers + (work.outer_groups if outer else 0)
    if ranks > 1:
        # A pipeline that does not free parameters gathers them once a step.
        when = "reduce" if work.stages and work.keeps_gathered else "forward"
        found.append(Traffic(axis, "all-gather", when, (blocks + outer) * work.c, groups, True))
        if not work.keeps_gathered:  # the outer parameters stay, or are not needed again
            found.append(Traffic(axis, "all-gather", "backward", blocks * work.c, layers, True))
            if work.counting_passes:
                found.append(Traffic(axis, "all-gather", "counting", blocks * work.c, layers, True))
        found.append(Traffic(axis, "reduce-scatter", _when_reduced(work), trained * work.r, groups, True))
    if work.layout.dp_replicate > 1:
        shard = -(-trained // ranks)
        found.append(Traffic("dp_replicate", "all-reduce", "reduce", shard * work.r, groups, True))
    return found


def _when_reduced(work: Workload) -> str:
    """The phase in which FSDP sums the gradients of what it shards."""
    return "backward" if reduces_each_microbatch(work.config.parallelism, work.layout) else "reduce"


def _tensor_parallel(work: Workload) -> list[Traffic]:
    """Megatron's sequence parallelism: attention and MLP gather the positions and scatter the sums, and the other way
    round in the backward pass. docs/planning.md has the counts."""
    if work.layout.tp == 1:
        return []
    rows = work.tokens * work.c * work.hidden
    # Gathers of positions, and as many scatters of sums: two in a block, one in a block with experts, where each rank
    # keeps its positions.
    inside = 2 * work.layers - work.sparse_layers
    gathers, scatters = _gathered_again(work)
    # Of what each rank has whole: norms, routers, and the factor of each adapter that is not split.
    whole = [k for k in work.kinds if k.trained and k.tp_dim is None and not k.expert and not k.name.endswith("bias")]
    # Gradients that FSDP has kept from earlier microbatches are in the type that they are summed in.
    when, kept = _when_reduced(work), work.batch.accumulation_steps > 1
    norms = sum(k.count * math.prod(k.shape) for k in whole) * (work.r if kept and when == "reduce" else work.c)
    return [
        # embedding → scatter; the blocks; the head gathers
        Traffic("tp", "all-gather", "forward", inside * rows, inside, False),
        Traffic("tp", "reduce-scatter", "forward", (inside + 1) * rows, inside + 1, False),
        Traffic("tp", "all-gather", "loss", rows, 1, False),
        Traffic("tp", "reduce-scatter", "loss", rows, 1, False),
        Traffic("tp", "all-reduce", "loss", 3 * FP32 * work.tokens, 2, False),
        Traffic("tp", "all-gather", "backward", (inside + gathers + 1) * rows, inside + gathers + 1, False),
        Traffic("tp", "reduce-scatter", "backward", (inside + scatters) * rows, inside + scatters, False),
        Traffic("tp", "all-reduce", when, norms, sum(k.count for k in whole), False),
    ]


def _context_parallel(work: Workload) -> list[Traffic]:
    """Keys and values of whole rows, gathered in each block, and their gradients summed back. Where a block
    is computed again, so is the gather."""
    if work.layout.cp == 1:
        return []
    layers, again = work.layers, _recomputed_blocks(work)
    rows = int(gathered_keys(work))
    return [
        Traffic("cp", "all-gather", "forward", layers * rows, layers, False),
        Traffic("cp", "all-gather", "backward", again * rows, again, False),
        Traffic("cp", "reduce-scatter", "backward", layers * rows, layers, False),
    ]


def _expert_parallel(work: Workload) -> list[Traffic]:
    """Rows to their experts and back, in each block that has some, and their gradients. Where a block is computed
    again, its rows are sent again. How many rows there are for each expert is sent before: a few numbers."""
    if work.layout.ep == 1:
        return []
    layers, rows = work.sparse_layers, work.rows * work.c * work.hidden
    again = sum(sparse and is_recomputed(work, place) for place, sparse in enumerate(work.blocks))
    return [
        Traffic("ep", "all-to-all", "forward", int(2 * layers * rows), 3 * layers, False),
        Traffic("ep", "all-to-all", "backward", int(2 * (layers + again) * rows), 2 * layers + 3 * again, False),
    ]


def _recomputed_blocks(work: Workload) -> int:
    """Blocks whose gathers of keys are done again in the backward pass."""
    recompute = work.config.activation_checkpoint
    if recompute.mode == "selective" and recompute.selective_ac_option == "op":
        return work.layers
    return sum(is_recomputed(work, place) for place in range(work.layers))


def _gathered_again(work: Workload) -> tuple[int, int]:
    """Gathers of positions that are done again in the backward pass, and scatters: a dense block's last is not needed,
    and where operations are recomputed none is."""
    whole = Counter(sparse for place, sparse in enumerate(work.blocks) if is_recomputed(work, place))
    gathers = 2 * whole[False] + whole[True]
    scatters = whole[False] + whole[True]
    if _recomputed_blocks(work) > sum(whole.values()):  # the others, operation by operation
        others = Counter(work.blocks) - whole
        gathers += 2 * others[False] + others[True]
    return gathers, scatters


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
    exchanged = [kind for kind in work.kinds if kind.muon and kind.is_exchanged(work.layout)]
    numbers = sum(kind.count * math.prod(kind.shape) for kind in exchanged)
    if work.stage_ranks == 1 or not numbers:
        return []
    # Of all matrices each rank owns its share, and holds its share; both go through it once.
    owned = numbers // work.stage_ranks
    held = numbers // (work.layout.fsdp * work.layout.tp)
    return [Traffic("world", "all-to-all", "optimizer", (owned + held) * work.c, 2 * work.layers, False)]
