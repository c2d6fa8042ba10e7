"""What cannot be combined with a pipeline is one message with the numbers that fit, before torch is imported."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from torchtitan_style.common.errors import UserError
from torchtitan_style.config.pipeline import Cost, make_stages, rank_of_stage
from torchtitan_style.config.schema import Parallelism
from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.checks import model_problems
from torchtitan_style.models.qwen3.spec import QWEN3
from torchtitan_style.models.stages import stages_of

PP, SCHEDULE = "--parallelism.pipeline_parallel_degree", "--parallelism.pipeline_parallel_schedule"
BLOCKS = "--parallelism.pipeline_parallel_blocks"


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        ([PP, "2"], 3, "pipeline_parallel_degree 2 × .* = 2 does not divide the 3 processes"),
        ([PP, "8"], 8, r"4 blocks cannot be divided among 8 stages \(8 ranks, 1F1B\): use at most 6 ranks"),
        ([PP, "4", SCHEDULE, "Interleaved1F1B"], 4, "among 8 stages .*: use at most 3 ranks"),
        (
            [PP, "2", BLOCKS, "[3, 2]"],
            2,
            r"\[3, 2\] are 2 stages with 5 blocks; there must be 2 stages .* with 4 blocks",
        ),
        ([BLOCKS, "[2, 2]"], 1, "is only read with pipeline_parallel_degree of 2 or more"),
        ([SCHEDULE, "GPipe"], 1, "is only read with pipeline_parallel_degree of 2 or more"),
        ([PP, "2", SCHEDULE, "ZBVZeroBubble", "--compile.enable"], 2, "or use Interleaved1F1B"),
        ([PP, "2", "--parallelism.fsdp_reduce_gradients", "each_microbatch"], 4, 'or set "last_microbatch"'),
        (
            [PP, "2", SCHEDULE, "ZBVZeroBubble", "--parallelism.fsdp_reshard_after_forward", "always"],
            4,
            'or set "never"',
        ),
        (
            [
                PP,
                "2",
                SCHEDULE,
                "Interleaved1F1B",
                "--training.local_batch_size",
                "1",
                "--training.global_batch_size",
                "7",
            ],
            2,
            "cannot run 7 microbatches in rounds of the same size: make them 6 or 8",
        ),
        ([PP, "2", SCHEDULE, "1f1b"], 2, "1F1B"),
    ],
)
def test_impossible_pipelines(overrides: list[str], world_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        load_config("qwen3", overrides, world_size=world_size)
    assert "problems in the configuration" not in str(refused.value)


def test_torch_is_not_needed_to_share_out_blocks() -> None:
    code = (
        "import sys; from torchtitan_style.launch.configure import load_config; "
        "from torchtitan_style.models.stages import stages_of; "
        f"config = load_config('qwen3', ['{PP}', '2'], world_size=2); "
        "print([len(stage.blocks) for stage in stages_of(config)], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[3, 1] False\n"  # the head costs as much as 2.7 blocks


def test_blocks_are_shared_out_by_cost() -> None:
    def shared(blocks: int, *, embedding: float, head: float, pp: int) -> list[int]:
        stages = make_stages(
            [Cost(time=1, state=1)] * blocks,
            embedding=Cost(time=0, state=embedding),
            head=Cost(time=head, state=head),
            parallelism=Parallelism(pipeline_parallel_degree=pp),
        )
        assert [i for stage in stages for i in stage.blocks] == list(range(blocks))
        return [len(stage.blocks) for stage in stages]

    assert shared(8, embedding=0, head=0, pp=2) == [4, 4]
    assert shared(8, embedding=0, head=2, pp=2) == [5, 3]
    assert shared(6, embedding=0, head=6, pp=2) == [6, 0]
    assert sorted(shared(5, embedding=0, head=0, pp=2)) == [2, 3]
    assert shared(2, embedding=1, head=1, pp=4) == [0, 1, 1, 0]


def test_a_14b_model_is_shared_out_within_a_tenth() -> None:
    config = load_config("qwen3_14b", [], world_size=16)
    assert [len(stage.blocks) for stage in stages_of(config)] == [21, 19]
    given = load_config("qwen3_14b", [BLOCKS, "[22, 18]"], world_size=16)
    assert [stage.blocks for stage in stages_of(given)] == [range(22), range(22, 40)]


def test_stages_in_a_v_begin_and_end_on_the_first_rank() -> None:
    assert [rank_of_stage(stage, pp=2, schedule="ZBVZeroBubble") for stage in range(4)] == [0, 1, 1, 0]
    assert [rank_of_stage(stage, pp=2, schedule="Interleaved1F1B") for stage in range(4)] == [0, 1, 0, 1]


def test_a_family_without_stages_is_refused() -> None:
    config = load_config("qwen3", [PP, "2"], world_size=2)
    problems = list(model_problems(config, dataclasses.replace(QWEN3, pipeline=False)))
    assert [problem.text for problem in problems] == ["qwen3 models cannot be split into pipeline stages: set it to 1"]
