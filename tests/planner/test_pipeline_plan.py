"""What a plan says of pipelines: what each rank holds, against the parameters of its stages; and who stands idle."""

from __future__ import annotations

import pytest

from torchtitan_style.config.layout import Layout
from torchtitan_style.config.pipeline import bubble
from torchtitan_style.launch.configure import load_config
from torchtitan_style.planner.devices import DEVICES, Assumptions
from torchtitan_style.planner.laid_out import lay_out, state_held
from torchtitan_style.planner.parameters import parameter_kinds, state_of
from torchtitan_style.planner.plan import make_plan
from torchtitan_style.planner.report import plan_lines
from torchtitan_style.planner.search import search
from torchtitan_style.planner.traffic import traffic_of
from torchtitan_style.planner.workload import Workload

PP = ["--parallelism.pipeline_parallel_degree", "2", "--training.seq_len", "64"]
BATCH = ["--training.local_batch_size", "1", "--training.global_batch_size", "16"]


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("model", [
    (), ("--model.name", "qwen3_moe", "--parallelism.expert_parallel_degree", "2", "--model.mlp_only_layers", "1"),
])  # fmt: skip
def test_each_rank_holds_what_is_planned(schedule: str, tied: str, model: tuple[str, ...]) -> None:
    layout = Layout(pp=2, dp_shard=2, tp=2, ep=2 if model else 1)
    overrides = [
        *model,
        *("--model.flavor", "debug", "--model.num_hidden_layers", "5", "--model.tie_word_embeddings", tied),
        *(*PP, *BATCH, "--parallelism.pipeline_parallel_schedule", schedule, "--optimizer.name", "muon"),
        *("--parallelism.tensor_parallel_degree", "2"),
    ]
    config = load_config("qwen3", overrides, world_size=8)
    numbers = 0
    for pp_rank in (0, 1):
        kinds = Workload.of_ranks(config, layout, on_gpu=True)[pp_rank].kinds
        assert state_held(lay_out(config, layout, 4 * pp_rank)) == state_of(kinds, layout, 4 * pp_rank)
        numbers += sum(kind.count for kind in kinds if not kind.copy)
        copies = [kind.name for kind in kinds if kind.copy]
        on_last = pp_rank == (0 if schedule == "ZBVZeroBubble" else 1)
        assert copies == (["lm_head.weight"] if tied == "true" and on_last else [])
    assert numbers == sum(kind.count for kind in parameter_kinds(config))


def test_a_plan_knows_stages_and_bubble() -> None:
    layout = Layout(pp=2, dp_shard=2, tp=4)
    degrees = ["--parallelism.pipeline_parallel_degree", "2", "--parallelism.tensor_parallel_degree", "4"]
    batch = ["--training.local_batch_size", "1", "--training.global_batch_size", "16"]
    plans = {}
    for schedule in ("1F1B", "GPipe", "Interleaved1F1B"):
        chosen = ["--parallelism.pipeline_parallel_schedule", schedule]
        given = ["--model.flavor", "14B", "--training.seq_len", "4096", *degrees, *batch, *chosen]
        config = load_config("qwen3", given, world_size=16)
        plans[schedule] = make_plan(config, layout, DEVICES["H100"], Assumptions())
    one = plans["1F1B"]
    passes = sum(phase.seconds for phase in one.time.phases[:3])
    assert one.time.bubble == pytest.approx(passes)  # of two stages: a microbatch's time
    assert plans["Interleaved1F1B"].time.bubble < 0.6 * one.time.bubble
    assert plans["GPipe"].memory.peak["activations"] > 3 * one.memory.peak["activations"]
    text = "\n".join(plan_lines(one))
    assert "the pipeline stands idle" in text
    assert "stage 1 shard 0 [8 9 10 11]" in text
    assert all(plan.work.layout.pp == 2 for plan in search(one.work.config, 16, DEVICES["H100"], Assumptions()).best)


def test_a_plan_counts_the_routing_passes_of_a_pipeline() -> None:
    given = ["--model.num_hidden_layers", "8", "--training.local_batch_size", "1", "--training.global_batch_size", "32",
             "--parallelism.pipeline_parallel_degree", "2"]  # fmt: skip
    config = load_config("qwen3_30b_a3b", given, world_size=16)
    layout = Layout(pp=2, dp_shard=8, ep=8)
    plan = make_plan(config, layout, DEVICES["H100"], Assumptions())
    counting = plan.time.phases[0]
    assert (counting.name, counting.times) == ("counting", 4)  # all microbatches, the first too
    [sent] = [each for each in traffic_of(Workload.of_ranks(config, layout, on_gpu=True)[0]) if
              (each.axis, each.phase) == ("pp", "counting")]  # fmt: skip
    assert sent.bytes == 4096 * 2048 * 2
    without = load_config("qwen3_30b_a3b", [*given, "--model.router_aux_loss_coef", "0"], world_size=16)
    faster = make_plan(without, layout, DEVICES["H100"], Assumptions())
    assert faster.time.bubble < plan.time.bubble
    assert faster.time.phases[0].name == "forward"


def test_weights_and_optimizer_are_shared_out_evenly() -> None:
    for name, pp in (("qwen3_14b", 2), ("qwen3_32b", 4)):
        config = load_config(name, [], world_size=pp * 8)
        layout = Layout(
            pp=pp, dp_shard=8 // config.parallelism.tensor_parallel_degree, tp=config.parallelism.tensor_parallel_degree
        )
        works = Workload.of_ranks(config, layout, on_gpu=True)
        bytes_of = [work.state.weights + work.state.optimizer for work in works]
        assert max(bytes_of) < 1.15 * sum(bytes_of) / pp
        assert min(bytes_of) > 0.85 * sum(bytes_of) / pp


def test_the_bubble_of_each_schedule() -> None:
    assert bubble("1F1B", pp=2, microbatches=8) == bubble("GPipe", pp=2, microbatches=8) == 1 / 8
    assert bubble("Interleaved1F1B", pp=4, microbatches=8) == 3 / 16
    assert bubble("ZBVZeroBubble", pp=2, microbatches=8) == 0
    assert bubble("1F1B", pp=1, microbatches=1) == 0
