"""Which layouts a search finds, and what the command says."""

from __future__ import annotations

import dataclasses
import json
import shlex

import pytest

from torchtitan_style.commands import plan as command
from torchtitan_style.common.device import _PEAK_BF16
from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import Layout, plan_layout
from torchtitan_style.launch.configure import load_config
from torchtitan_style.planner.devices import DEVICES, Assumptions, device_named, with_assumptions
from torchtitan_style.planner.plan import make_plan
from torchtitan_style.planner.search import least_ranks, nearest_that_fits, overrides_of, search

H100 = DEVICES["H100"]


def test_what_is_found_fits_is_fastest_and_can_be_pasted() -> None:
    config = load_config("qwen3_8b", [], world_size=None)
    found = search(config, 16, H100, Assumptions())
    assert 0 < len(found.best) <= 5 < found.fitting < found.tried
    times = [plan.time.step_seconds for plan in found.best]
    assert times == sorted(times)
    for plan in found.best:
        pasted = load_config("qwen3_8b", shlex.split(overrides_of(plan)), world_size=16)
        layout = plan_layout(pasted.parallelism, 16)
        again = make_plan(pasted, layout, H100, Assumptions())
        assert layout == plan.work.layout
        assert (again.memory.total, again.time.step_seconds) == (plan.memory.total, plan.time.step_seconds)
        assert again.memory.total <= H100.memory
        assert again.work.batch.global_batch_size == config.training.global_batch_size


def test_experts_are_shared_out_over_as_many_ranks_as_is_fastest(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("qwen3_30b_a3b", [], world_size=None)
    found = search(config, 512, H100, Assumptions(), rows=512)  # a row each: nothing hides the gathers of all experts
    best = found.best[0]
    assert best.work.layout.ep > 1
    pasted = load_config("qwen3_30b_a3b", shlex.split(overrides_of(best)), world_size=512)
    assert plan_layout(pasted.parallelism, 512) == best.work.layout
    rows = ("--training.local_batch_size", "2", "--model.num_hidden_layers", "2")
    status, text, warnings = run(
        capsys, "--config", "qwen3_30b_a3b", "--world-size", "32", "--device", "h100", *rows, "--json"
    )
    assert (status, warnings) == (0, "")
    report = json.loads(text)
    assert report["layout"]["ep"] == 8
    sent = [each for each in report["traffic"] if each["axis"] == "ep"]
    # Two microbatches, the second of which is routed once more to count; whole blocks are recomputed.
    rows_of_a_layer = 2 * 4096 * 8 * 2048 * 2
    passes = {"counting": 1, "forward": 2, "backward": 2 * 2}
    assert {each["phase"]: each["bytes_per_step"] for each in sent} == {
        phase: 2 * times * 2 * rows_of_a_layer for phase, times in passes.items()
    }
    # By active parameters, of which the embedding is not multiplied with.
    assert best.time.flops / best.time.tokens == pytest.approx(6 * 3.04e9 + 12 * 48 * 32 * 128 * 4096, rel=0.01)


def test_32b_on_512_ranks_is_a_matter_of_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("qwen3_32b", [], world_size=None)
    counted = 0

    def counting(*args: object, **named: object) -> object:
        nonlocal counted
        counted += 1
        return make_plan(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("torchtitan_style.planner.search.make_plan", counting)
    assert search(config, 512, H100, Assumptions()).best
    assert counted < 5000  # of less than a millisecond each


def test_the_least_number_of_ranks() -> None:
    config = load_config("qwen3_8b", ["--training.local_batch_size", "1"], world_size=None)
    least = least_ranks(config, H100, Assumptions())
    assert least is not None
    assert 1 < least <= 8  # 16 bytes of each of 8.2 G parameters are more than one has
    assert search(config, least, H100, Assumptions()).best
    assert not search(config, least // 2, H100, Assumptions()).best
    assert least_ranks(config, dataclasses.replace(H100, memory=2**20), Assumptions(), most=64) is None


def test_the_nearest_layout_changes_least() -> None:
    config = load_config("qwen3_8b", ["--training.local_batch_size", "8", "--activation_checkpoint.mode", "none"],
                         world_size=8)  # fmt: skip
    layout = Layout(dp_shard=8)
    assert not make_plan(config, layout, H100, Assumptions()).fits
    nearest = nearest_that_fits(config, layout, H100, Assumptions())
    assert nearest is not None
    assert nearest.fits
    assert nearest.work.layout == layout
    assert nearest_that_fits(config, layout, dataclasses.replace(H100, memory=2**30), Assumptions()) is None


def test_more_of_everything_costs_more() -> None:
    def planned(*overrides: str, assume: tuple[str, ...] = ()) -> tuple[int, float]:
        config = load_config("qwen3_8b", overrides, world_size=8)
        device, assumptions = with_assumptions(H100, list(assume))
        plan = make_plan(config, plan_layout(config.parallelism, 8), device, assumptions)
        return plan.memory.total, plan.time.step_seconds

    memory, seconds = planned()
    less, slower = planned("--activation_checkpoint.mode", "full")
    assert less < memory
    assert slower > seconds
    more, faster = planned("--parallelism.fsdp_reshard_after_forward", "never")
    assert more > memory
    assert faster <= seconds
    assert planned(assume=("matmul_efficiency=0.25",))[1] > seconds
    assert planned(assume=("library_gib=2",))[0] > memory
    assert planned(assume=("overlap=0",))[1] > planned(assume=("overlap=1",))[1]


def test_the_tables_of_devices_agree() -> None:
    for name, device in DEVICES.items():
        part = {"A100-40": "A100", "A100-80": "A100", "RTX4090": "RTX 4090"}.get(name, name)
        assert _PEAK_BF16.get(part, device.bf16_flops) == device.bf16_flops
    assert device_named("rtx 4090") is DEVICES["RTX4090"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        command.main(list(arguments))
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


def test_the_report_and_its_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "qwen3_8b", "--model.num_hidden_layers", "2", "--world-size", "8", "--device", "h100"]
    status, text, warnings = run(capsys, *arguments)
    assert status == 0
    assert warnings == ""
    for part in ("mesh: dp 8 × tp 1, 8 ranks on 1 host", "lm_head.weight", "optimizer state", "reduce-scatter", "MFU",
                 "device-hours", "a checkpoint is", "matmul_efficiency 0.5", ": fits"):  # fmt: skip
        assert part in text
    _, small, _ = run(capsys, "--model.flavor", "debug", "--world-size", "1", "--device", "h100")
    for unit in (" GFLOP a step", " s, 0.", " device-hours", "a checkpoint is 1.38 MB"):  # of a run that is small
        assert unit in small
    status, text, _ = run(capsys, *arguments, "--json")
    found = json.loads(text)
    assert found["fits"] is True
    peak = found["moments_bytes"][found["peak_moment"]]
    assert sum(peak.values()) == found["memory_bytes"]
    assert sum(phase["times"] * phase["seconds"] for phase in found["phases"]) == pytest.approx(found["step_seconds"])
    status, text, _ = run(capsys, *arguments, "--search", "--json")
    assert json.loads(text)["best"][0]["step_seconds"] <= found["step_seconds"]


def test_a_layout_that_holds_something_else_is_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchtitan_style.planner.laid_out.FP32", 8)
    status, _, warnings = run(capsys, "--config", str(DEFAULT_CONFIG), "--device", "H100")
    assert status == 0
    assert "warning: rank 0 would hold" in warnings


@pytest.mark.parametrize(("arguments", "message"), [
    (("--device", "H10"), 'there is no device "H10"; did you mean H100?'),
    (("--world-size", "6", "--parallelism.tensor_parallel_degree", "4"), "does not divide the 6 processes"),
    (("--config", "qwen3_32b", "--world-size", "8", "--parallelism.tensor_parallel_degree", "1", "--device", "A100-40",
      "--parallelism.pipeline_parallel_degree", "1", "--training.global_batch_size", "32"),
     "optimizer state alone take 61.0 GiB on each rank, and A100-40 has 40.0"),
    (("--world-size", "0"), "--world-size: must be at least 1"),
    (("--assume", "matmul=1"), 'no assumption "matmul"'),
    (("--assume", "overlap=x"), "overlap must be a number"),
])  # fmt: skip
def test_mistakes_are_one_message(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    with_device = arguments if "--device" in arguments else (*arguments, "--device", "H100")
    status, output, error = run(capsys, *with_device)
    assert status == 2
    assert output == ""
    assert message in error
    assert error.count("error") == 1


def test_a_run_that_does_not_fit_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--config", str(DEFAULT_CONFIG), "--device", "H100", "--world-size", "1")
    status, output, _ = run(capsys, *arguments, "--assume", "memory=7e8")
    assert status == 1
    assert "DOES NOT FIT" in output
    status, output, _ = run(capsys, *arguments, "--assume", "memory=1e6", "--search")
    assert status == 1
    assert "none fits" in output
    assert "no number of ranks" in output
