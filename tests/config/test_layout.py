"""Degrees and batch sizes against their definition by trial."""

from __future__ import annotations

import itertools

import pytest

from torchtitan_style.config.layout import BatchPlan, Layout, plan_batch, plan_layout
from torchtitan_style.config.schema import Parallelism, Training


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12])
def test_degrees_multiply_to_the_world_size_or_are_refused(world_size: int) -> None:
    degrees = (1, 2, 3, 4)
    for replicate, shard, tp in itertools.product(degrees, (-1, *degrees), degrees):
        options = range(1, world_size + 1) if shard == -1 else [shard]
        fitting = [
            Layout(dp_replicate=replicate, dp_shard=s, tp=tp) for s in options if replicate * s * tp == world_size
        ]
        wanted = Parallelism(
            data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard, tensor_parallel_degree=tp
        )
        if fitting:
            layout = plan_layout(wanted, world_size)
            assert [layout] == fitting
            assert (layout.world_size, layout.dp) == (world_size, world_size // tp)
        else:
            with pytest.raises(ValueError, match=f"{world_size} processes"):
                plan_layout(wanted, world_size)


@pytest.mark.parametrize("dp", [1, 2, 3, 4])
def test_batches_are_shared_out_evenly_or_refused(dp: int) -> None:
    for local, total in itertools.product((-1, 1, 2, 3, 8), (-1, 1, 4, 6, 8, 12, 24)):
        if local == -1:
            # The whole share at once.
            fitting = [BatchPlan(total, n, 1) for n in range(1, 25) if n * dp == total]
        elif total == -1:
            fitting = [BatchPlan(local * dp, local, 1)]
        else:
            fitting = [BatchPlan(total, local, n) for n in range(1, 25) if n * local * dp == total]
        wanted = Training(local_batch_size=local, global_batch_size=total)
        if fitting:
            assert [plan_batch(wanted, dp)] == fitting
        else:
            with pytest.raises(
                ValueError, match="both be -1" if local == total == -1 else f"{total} rows .* {dp} data"
            ):
                plan_batch(wanted, dp)


def test_a_degree_that_does_not_divide_is_told_with_the_number_to_start() -> None:
    with pytest.raises(ValueError, match=r"= 4 does not divide the 6 processes: start a multiple of 4 \(NPROC=4\)"):
        plan_layout(Parallelism(data_parallel_replicate_degree=2, tensor_parallel_degree=2), 6)


def test_layout_in_words() -> None:
    assert str(Layout(dp_replicate=1, dp_shard=4, tp=2)) == "dp 4 × tp 2"
    assert str(Layout(dp_replicate=2, dp_shard=4, tp=1)) == "dp_replicate 2 × dp 4 × tp 1"
