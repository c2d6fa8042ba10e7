"""Pipeline stages as plain data: which blocks a stage has, which rank runs it, and how long ranks stand idle.

Stages are numbered in the order in which a row passes them. With "1F1B" and "GPipe" each rank of the pp axis runs one.
With "Interleaved1F1B" it runs two, dealt out in turn (rank 0 of 2: stages 0 and 2). With "ZBVZeroBubble" it runs two
that lie in the shape of a V (rank 0 of 2: stages 0 and 3), so that the first and the last stage are on the same rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from .kinds import PipelineSchedule
from .schema import Parallelism


@dataclass(frozen=True)
class Stage:
    """One part of the model. The first also has the embedding, the last the final norm and the head."""

    index: int
    count: int
    """Of all stages."""
    blocks: range

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


@dataclass(frozen=True)
class Cost:
    """What a part of the model costs."""

    time: float
    """Floating-point operations of a token."""
    state: float
    """Numbers of weights and optimizer state."""


_STATE_SHARE = 0.25
"""Weight of the state in what a part costs: it takes memory, and it is summed over ranks and updated."""


def stages_per_rank(schedule: PipelineSchedule) -> int:
    return 2 if schedule in ("Interleaved1F1B", "ZBVZeroBubble") else 1


def num_stages(parallelism: Parallelism) -> int:
    """Of the whole pipeline."""
    return parallelism.pipeline_parallel_degree * stages_per_rank(parallelism.pipeline_parallel_schedule)


def rank_of_stage(stage: int, *, pp: int, schedule: PipelineSchedule) -> int:
    """The rank on the pp axis that runs ``stage``."""
    return min(stage, 2 * pp - 1 - stage) if schedule == "ZBVZeroBubble" else stage % pp


def bubble(schedule: PipelineSchedule, *, pp: int, microbatches: int) -> float:
    """How long a rank stands idle in a step, as a share of the time that it computes, if all stages take as long.

    (pp - 1) / microbatches, of half as long stages with two on each rank (Narayanan et al. 2021, section 2.2). In a V
    the gradients of weights fill what is left, given 2·pp - 1 microbatches (Qi et al. 2023, section 6; there a forward
    pass, the gradients of inputs and those of weights take as long as one another).
    """
    if schedule == "ZBVZeroBubble":
        return max(0, 2 * pp - 1 - microbatches) / (2 * microbatches)
    return (pp - 1) / (stages_per_rank(schedule) * microbatches)


def schedule_problem(parallelism: Parallelism, microbatches: int) -> str | None:
    """Why ``pipeline_parallel_schedule`` cannot run so many microbatches, or None if it can."""
    pp = parallelism.pipeline_parallel_degree
    if pp == 1 or parallelism.pipeline_parallel_schedule != "Interleaved1F1B" or _in_rounds(microbatches, pp):
        return None
    fitting = [n for n in range(max(1, microbatches - pp), microbatches + pp) if _in_rounds(n, pp)]
    return (
        f"Interleaved1F1B on {pp} ranks cannot run {microbatches} microbatches in rounds of the same size: make them "
        f"{' or '.join(map(str, fitting))}, or use another schedule"
    )


def _in_rounds(microbatches: int, pp: int) -> bool:
    return microbatches % max(1, microbatches // pp) == 0


def make_stages(blocks: Sequence[Cost], *, embedding: Cost, head: Cost, parallelism: Parallelism) -> tuple[Stage, ...]:
    """All stages, first to last: as ``pipeline_parallel_blocks`` says, else so that the dearest costs least.

    Stages other than the first and the last have at least one block.
    """
    count = num_stages(parallelism)
    numbers = parallelism.pipeline_parallel_blocks or _share_out(tuple(blocks), embedding, head, count)
    starts = [sum(numbers[:i]) for i in range(count + 1)]
    return tuple(Stage(i, count, range(starts[i], starts[i + 1])) for i in range(count))


@lru_cache(maxsize=100)
def _share_out(blocks: tuple[Cost, ...], embedding: Cost, head: Cost, stages: int) -> list[int]:
    """Blocks of each stage. Of shares whose dearest stage costs the same, the one with the least sum of squares."""
    costs = _combined([embedding, *blocks, head])
    if stages == 1:
        return [len(blocks)]
    sums = [0.0]
    for cost in costs[1:-1]:
        sums.append(sums[-1] + cost)
    # best[n]: (cost of the dearest, sum of squares, blocks of each) of the stages so far, which have n blocks
    best = {n: _add((0.0, 0.0, []), costs[0] + sums[n], n) for n in range(len(blocks) + 1)}
    for stage in range(1, stages):
        last = stage == stages - 1
        best = {
            n: min(
                _add(best[m], sums[n] - sums[m] + (costs[-1] if last else 0), n - m)
                for m in best
                if (m <= n if last else m < n)
            )
            for n in ([len(blocks)] if last else range(min(best) + 1, len(blocks) + 1))
        }
    return best[len(blocks)][2]


def _combined(parts: list[Cost]) -> list[float]:
    """Each part's cost as a share of the whole."""
    time, state = sum(part.time for part in parts), sum(part.state for part in parts)
    return [(1 - _STATE_SHARE) * part.time / time + _STATE_SHARE * part.state / state for part in parts]


def _add(found: tuple[float, float, list[int]], cost: float, blocks: int) -> tuple[float, float, list[int]]:
    dearest, squares, numbers = found
    return max(dearest, cost), squares + cost * cost, [*numbers, blocks]
