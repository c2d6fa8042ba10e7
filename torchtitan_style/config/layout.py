"""Arithmetic on the degrees and batch sizes: which ranks there are, how many rows each one takes, and which
positions of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .schema import Data, Parallelism, Training

_MOST_STREAMS = 64
"""A stream keeps a file open."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the mesh axes, outermost first. An axis that is not used has size 1."""

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Groups of ranks that each hold all shards."""
    dp_shard: int = 1
    """Ranks that parameters, gradients and optimizer state are sharded over, together with cp."""
    cp: int = 1
    """Ranks that share the positions of a row."""
    tp: int = 1
    """Ranks that share each matrix."""
    ep: int = 1
    """Of the dp_shard × cp ranks so many share out the experts: no axis beside the others."""

    @property
    def dp(self) -> int:
        """Ranks that see different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Ranks that each parameter is sharded over."""
        return self.dp_shard * self.cp

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def __str__(self) -> str:
        axes = {"pp": self.pp, "dp_replicate": self.dp_replicate, "dp": self.dp_shard, "cp": self.cp, "tp": self.tp}
        axes["ep"] = self.ep
        return " × ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1 or axis in ("dp", "tp"))


@dataclass(frozen=True)
class RowPart:
    """The positions of each row that one of the cp ranks takes.

    A row is cut into 2 · ranks equal spans, and rank r takes the r-th from the left and the r-th from the right: late
    positions attend to more than early ones do, and each rank has as much to compute (Llama Team 2024, "The Llama 3
    Herd of Models", section 3.3.2).
    """

    rank: int = 0
    ranks: int = 1

    def spans(self, seq_len: int) -> tuple[tuple[int, int], ...]:
        """Beginning and end of each, from the left."""
        if self.ranks == 1:
            return ((0, seq_len),)
        size = seq_len // (2 * self.ranks)
        return tuple((number * size, (number + 1) * size) for number in (self.rank, 2 * self.ranks - 1 - self.rank))


@dataclass(frozen=True)
class BatchPlan:
    """How the rows of an optimizer step are shared out."""

    global_batch_size: int
    local_batch_size: int
    accumulation_steps: int


def plan_layout(parallelism: Parallelism, world_size: int) -> Layout:
    """The mesh that ``parallelism`` asks for on ``world_size`` ranks.

    Raises ValueError if it does not come out even.
    """
    replicate, shard = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    pp, cp, tp = (
        parallelism.pipeline_parallel_degree,
        parallelism.context_parallel_degree,
        parallelism.tensor_parallel_degree,
    )
    ep = parallelism.expert_parallel_degree
    others = pp * replicate * cp * tp
    fixed = least_world_size(parallelism)
    given = f"pipeline_parallel_degree {pp} × " if pp > 1 else ""
    given += f"data_parallel_replicate_degree {replicate}"
    given += f" × context_parallel_degree {cp}" if cp > 1 else ""
    given += f" × tensor_parallel_degree {tp}"
    if shard != -1:
        given += f" × data_parallel_shard_degree {shard}"
        if fixed != world_size:
            raise ValueError(
                f"{given} = {fixed}, but there are {world_size} processes: start NPROC={fixed}, or set "
                "data_parallel_shard_degree = -1 to use all that are left"
            )
    elif world_size % fixed:
        raise ValueError(
            f"{given} = {fixed} does not divide the {world_size} processes: "
            f"start a multiple of {fixed} (NPROC={fixed}), or lower a degree"
        )
    layout = Layout(pp=pp, dp_replicate=replicate, dp_shard=world_size // others, cp=cp, tp=tp, ep=ep)
    if layout.fsdp % ep:
        raise ValueError(
            f"expert_parallel_degree {ep} does not divide the {layout.fsdp} ranks that parameters are sharded over: "
            f"start a multiple of {others // cp * math.lcm(cp, ep)} processes, or lower it"
        )
    return layout


def least_world_size(parallelism: Parallelism, *, shards: int = 1) -> int:
    """The product of the degrees. shards: what data_parallel_shard_degree = -1 counts as."""
    shard = parallelism.data_parallel_shard_degree
    product = parallelism.data_parallel_replicate_degree * (shards if shard == -1 else shard)
    product *= parallelism.pipeline_parallel_degree
    return product * parallelism.context_parallel_degree * parallelism.tensor_parallel_degree


def reduces_each_microbatch(parallelism: Parallelism, layout: Layout) -> bool:
    """Whether FSDP sums gradients over its ranks after each microbatch, and not after a step's last alone."""
    when = parallelism.fsdp_reduce_gradients or ("each_microbatch" if layout.pp == 1 else "last_microbatch")
    return when == "each_microbatch" and layout.fsdp > 1


def reshards_after_forward(parallelism: Parallelism) -> bool:
    """Whether FSDP frees the parameters that it has gathered for a block's forward pass."""
    default = "always" if parallelism.pipeline_parallel_degree == 1 else "never"
    return (parallelism.fsdp_reshard_after_forward or default) == "always"


def plan_batch(training: Training, dp: int) -> BatchPlan:
    """Local, global and accumulated batch on ``dp`` data-parallel ranks.

    Raises ValueError if the global batch cannot be shared out evenly.
    """
    local, total = training.local_batch_size, training.global_batch_size
    if local == -1 and total == -1:
        raise ValueError("local_batch_size and global_batch_size cannot both be -1: set one of them")
    if total == -1:
        return BatchPlan(local * dp, local, 1)
    if local == -1:
        if total % dp:
            raise ValueError(
                f"{total} rows cannot be shared out evenly over {dp} data-parallel ranks; set a multiple of {dp}"
            )
        return BatchPlan(total, total // dp, 1)
    if total % (local * dp):
        raise ValueError(
            f"{total} rows are not a multiple of local_batch_size {local} × {dp} data-parallel ranks = "
            f"{local * dp}; local_batch_size = -1 takes a rank's whole share at once"
        )
    return BatchPlan(total, local, total // (local * dp))


def fit_local_batch(training: Training, dp: int) -> int:
    """training.local_batch_size; lowered to a divisor of a rank's share of the global batch if it is none."""
    local, total = training.local_batch_size, training.global_batch_size
    if -1 in (local, total) or total % dp:
        return local  # it fits, or no other would
    share = total // dp
    return max(size for size in range(1, min(local, share) + 1) if share % size == 0)


def plan_streams(data: Data, global_batch: int, dp: int) -> int:
    """How many streams fill the global batch on ``dp`` data-parallel ranks.

    Raises ValueError if rows, streams and ranks cannot be shared out evenly.
    """
    number = data.num_streams
    if number == -1:
        number = max(n for n in range(1, min(global_batch, _MOST_STREAMS) + 1) if global_batch % n == 0)
    if global_batch % number:
        fitting = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
        raise ValueError(
            f"{number} streams cannot fill {global_batch} rows evenly; these numbers can: {_list(fitting)}"
        )
    if number % dp:
        fitting = [n for n in range(1, number + 1) if number % n == 0]
        raise ValueError(
            f"{number} streams cannot be shared out evenly over {dp} data-parallel ranks; these numbers of ranks fit: "
            f"{_list(fitting)}"
        )
    return number


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
