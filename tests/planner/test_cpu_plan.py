"""What a plan for this machine's CPU rests on: what is measured, and how ranks share it."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from torchtitan_style.config.layout import Layout, plan_layout
from torchtitan_style.launch.configure import load_config
from torchtitan_style.planner import this_machine
from torchtitan_style.planner.devices import Assumptions, generic_device
from torchtitan_style.planner.memory import plan_memory
from torchtitan_style.planner.plan import make_plan

CPU = generic_device(2**34, on_gpu=False, ranks=2)
DEBUG = ["--model.flavor", "debug", "--training.seq_len", "64", "--training.global_batch_size", "8"]


@pytest.mark.parametrize(("ranks", "each", "cores", "threads"), [
    (1, None, 4, 4),
    (2, "1", 4, 2),
    (2, "2", 4, 4),
    (4, "2", 4, 4),
    (2, "nonsense", 4, 4),
])  # fmt: skip
def test_the_rates_are_those_of_all_ranks_together(
    ranks: int, each: str | None, cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank of two measures with two threads, though it has one: its plan shares the rate out among both."""
    before = torch.get_num_threads()
    seen = []
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if each is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", each)
    monkeypatch.setattr(this_machine.devices, "peak_flops", lambda *_: seen.append(torch.get_num_threads()) or 1e11)
    this_machine.measured_cpu(ranks, copied=2**10)
    assert seen == [threads, threads]
    assert torch.get_num_threads() == before


def test_ranks_share_the_cores() -> None:
    """Two processes on the cores of one take as long, and their communication on top."""
    one = make_plan(load_config("qwen3", DEBUG, world_size=1), Layout(), CPU, Assumptions())
    config = load_config("qwen3", DEBUG, world_size=2)
    free = dataclasses.replace(Assumptions(), latency_cpu=0)
    fast = dataclasses.replace(CPU, link_bandwidth=1e15)
    two = make_plan(config, plan_layout(config.parallelism, 2), fast, free)
    assert two.time.step_seconds == pytest.approx(one.time.step_seconds, rel=0.15)  # it counts operations of both
    slow = make_plan(config, plan_layout(config.parallelism, 2), CPU, Assumptions())
    assert slow.time.step_seconds > two.time.step_seconds + 10 * Assumptions().latency_cpu


def test_a_schedule_that_splits_backward_passes_pays_for_it() -> None:
    pipeline = ["--parallelism.pipeline_parallel_degree", "2", "--training.local_batch_size", "1"]
    overrides = [*DEBUG, *pipeline, "--model.num_hidden_layers", "4"]
    seconds = {}
    for schedule in ("1F1B", "ZBVZeroBubble"):
        chosen = ["--parallelism.pipeline_parallel_schedule", schedule]
        config = load_config("qwen3", [*overrides, *chosen], world_size=2)
        for share in (0.0, 0.3):
            assumptions = dataclasses.replace(Assumptions(), split_backward=share)
            plan = make_plan(config, plan_layout(config.parallelism, 2), CPU, assumptions)
            seconds[schedule, share] = plan.time.step_seconds
    assert seconds["1F1B", 0.0] == seconds["1F1B", 0.3]
    assert seconds["ZBVZeroBubble", 0.0] < seconds["1F1B", 0.0]
    assert seconds["ZBVZeroBubble", 0.0] < seconds["ZBVZeroBubble", 0.3]


def test_one_process_has_the_matrices_of_a_shape_in_hand_at_once() -> None:
    """Muon multiplies them together: 24 of gate and up here, 18.9 M numbers, of which it takes 2^24."""
    shape = ["--model.hidden_size", "512", "--model.intermediate_size", "1536", "--model.num_hidden_layers", "12",
             "--model.max_window_layers", "12", "--model.head_dim", "64"]  # fmt: skip
    config = load_config("qwen3", shape, world_size=1)
    assert config.optimizer.name == "muon"
    step = plan_memory(config, Layout(), on_gpu=False).moments["optimizer step"]
    assert step["buffers"] == 6 * 2 * 2**24
