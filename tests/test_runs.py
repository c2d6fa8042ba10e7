"""Whole runs, as ./run_train.sh starts them: real processes, real files, real signals."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.data.corpora import words, write_jsonl
from torchtitan_style.checkpoint.folder import CheckpointFolder
from torchtitan_style.common.errors import UserError
from torchtitan_style.data.prepare.store import CorpusStore
from torchtitan_style.launch.configure import load_config
from torchtitan_style.launch.preflight import preflight

FP32 = ["--training.mixed_precision_param", "float32"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A tiny model on a made-up corpus of 200 documents."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "corpus.jsonl", words(200, lengths=(20, 200)))
    path = folder / "config.toml"
    path.write_text(f"""
[model]
flavor = "debug"
[data]
dataset = "files"
paths = ["{folder}/corpus.jsonl"]
[training]
steps = 30
seq_len = 64
global_batch_size = 8
local_batch_size = -1
[optimizer]
lr = 1e-3
[lr_scheduler]
warmup_steps = 10
[validation]
freq = 15
steps = 2
[generation]
max_new_tokens = 2
[metrics]
enable_tensorboard = false
""")
    return path


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> dict[int, dict]:
    return {record["step"]: record for record in records(run) if "loss" in record}


def weights(checkpoint: Path, scratch: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(checkpoint, scratch / "all.pt")
    return torch.load(scratch / "all.pt")


def succeed(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout


# Layouts

LAYOUTS = {
    "dp2 × tp2": (4, ["--parallelism.tensor_parallel_degree", "2"]),
    "dp2, 2 microbatches": (2, ["--training.local_batch_size", "2"]),
    "dp_replicate2 × dp2": (4, ["--parallelism.data_parallel_replicate_degree", "2"]),
}
# What these consist of is in the ones above, and their gradients are compared in tests/distributed/test_gradients.py.
MORE_LAYOUTS = {
    "dp4": (4, []),
    "tp4": (4, ["--parallelism.tensor_parallel_degree", "4"]),
    "1 process, 4 microbatches": (1, ["--training.local_batch_size", "2"]),
    "tp2, full recomputation": (
        2,
        ["--parallelism.tensor_parallel_degree", "2", "--activation_checkpoint.mode", "full"],
    ),
}


@pytest.fixture(scope="module")
def one_process(launch, config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("one process")
    output = succeed(launch("--config", config, "--job.dump_folder", run, *FP32))
    assert "validation at step 30" in output
    return run


def test_a_run_leaves_what_is_documented(one_process) -> None:
    assert {path.name for path in one_process.iterdir()} == {
        "config.toml", "metrics.jsonl", "events.jsonl", "tokenizer", "data", "checkpoint",
    }  # fmt: skip
    assert (one_process / "checkpoint" / "step-30" / "manifest.json").exists()
    best = (one_process / "checkpoint" / "best").read_text().strip()
    assert (one_process / "checkpoint" / best).is_dir()
    training = steps(one_process)
    assert sorted(training) == list(range(1, 31))
    assert training[30].keys() == {
        "step", "loss", "grad_norm", "lr", "tokens_seen", "tokens_per_second", "mfu", "peak_memory_gib",
        "data_wait_fraction", "time", "batch_hash",
    }  # fmt: skip
    [planned] = [record for record in training.values() if "planned_memory_gib" in record]
    assert planned["step"] > 1
    # The libraries are most of both. Processes of these tests are forks, which share them.
    assert 0.35 < planned["planned_memory_gib"] < 0.6
    assert planned["planned_step_seconds"] > 0
    times = [record["time"] for record in records(one_process)]
    assert times == sorted(times)
    assert 0 <= time.time() - times[-1] < 3600
    assert all(0 < record["mfu"] <= 1 for record in training.values())
    assert training[30]["tokens_seen"] == 30 * 8 * 64
    validations = [record for record in records(one_process) if "val_loss" in record]
    assert [record["step"] for record in validations] == [0, 15, 30]
    assert validations[0].keys() == {"step", "val_loss", "val_perplexity", "val_accuracy", "time"}
    assert validations[-1]["val_loss"] < validations[0]["val_loss"] - 1


def test_the_resolved_config_starts_the_same_run(launch, one_process, tmp_path) -> None:
    succeed(launch("--config", one_process / "config.toml", "--job.dump_folder", tmp_path / "again"))
    again, before = steps(tmp_path / "again"), steps(one_process)
    assert [(r["loss"], r["grad_norm"]) for r in again.values()] == [
        (r["loss"], r["grad_norm"]) for r in before.values()
    ]


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.nightly) for name in MORE_LAYOUTS)]
)
def test_every_layout_has_the_same_curve_and_batches(launch, config, one_process, tmp_path, layout: str) -> None:
    nproc, options = (LAYOUTS | MORE_LAYOUTS)[layout]
    line = ["--config", config, "--job.dump_folder", tmp_path / "run", *FP32, *options]
    # The first half of the run, to the second validation.
    line += ["--training.steps", 15, "--lr_scheduler.total_steps", 30]
    # One of them by the interpreters that a user would start.
    succeed(launch(*line, nproc=nproc, forked=layout != "dp2, 2 microbatches"))
    expected, found = steps(one_process), steps(tmp_path / "run")
    assert sorted(found) == list(range(1, 16))
    assert found[1]["loss"] == pytest.approx(expected[1]["loss"], rel=1e-6)
    for step in found:
        assert found[step]["batch_hash"] == expected[step]["batch_hash"], step
        # Differences of 1e-7 in the gradients grow over the steps.
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5), step
        assert found[step]["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-4), step
    by_step = {r["step"]: r["val_loss"] for r in records(one_process) if "val_loss" in r}
    for record in records(tmp_path / "run"):
        if "val_loss" in record:
            assert record["val_loss"] == pytest.approx(by_step[record["step"]], rel=1e-5)


PP, CP, TP = (f"--parallelism.{kind}_parallel_degree" for kind in ("pipeline", "context", "tensor"))
STAGES = [PP, 2, "--training.local_batch_size", 2]
DEFAULT_LAYOUTS = {
    "1": (1, []),
    "dp2": (2, []),
    "tp2": (2, [TP, 2]),
    "pp2": (2, STAGES),
    "pp2 × dp2": (4, STAGES),
    "pp2 × tp2": (4, [*STAGES, TP, 2]),
    "cp2": (2, [CP, 2]),
    "cp2 × tp2": (4, [CP, 2, TP, 2]),
    "cp2 × dp2": (4, [CP, 2]),
    "pp2 × cp2": (4, [*STAGES, CP, 2]),
}


@pytest.fixture(scope="module")
def default_run(launch, tmp_path_factory):
    """default_run(layout): 30 steps of ./run_train.sh in fp32."""
    folder = tmp_path_factory.mktemp("default runs")
    shorter = ["--training.steps", 30, "--lr_scheduler.total_steps", 450, "--generation.enable", "false"]
    shorter += ["--checkpoint.enable", "false", "--validation.steps", 1, "--data.prepared_folder", folder / "prepared"]

    def run(layout: str) -> dict[int, dict]:
        nproc, options = DEFAULT_LAYOUTS[layout]
        if not (folder / layout).exists():
            succeed(launch("--job.dump_folder", folder / layout, *FP32, *shorter, *options, nproc=nproc))
        return steps(folder / layout)

    return run


@pytest.mark.nightly
@pytest.mark.parametrize("layout", [name for name in DEFAULT_LAYOUTS if name != "1"])
def test_the_default_run_has_the_same_curve_on_every_layout(default_run, layout: str) -> None:
    expected, found = default_run("1"), default_run(layout)
    assert sorted(found) == list(range(1, 31))
    assert [found[step]["batch_hash"] for step in found] == [expected[step]["batch_hash"] for step in found]
    differences = [abs(found[step]["loss"] / expected[step]["loss"] - 1) for step in found]
    print(f"{layout}: losses differ by up to {max(differences):.1e}")
    assert max(differences) < 1e-5


def test_bf16_means_the_same_on_one_process_and_on_several(launch, config, tmp_path) -> None:
    options = ["--training.steps", 15, "--validation.enable", "false", "--generation.enable", "false"]
    for nproc in (1, 2):
        succeed(launch("--config", config, "--job.dump_folder", tmp_path / str(nproc), *options, nproc=nproc))
    one, two = steps(tmp_path / "1"), steps(tmp_path / "2")
    # bf16 rounds to 2⁻⁸; over the 512 tokens of a step that averages out, and does not build up over the steps.
    for step in one:
        assert one[step]["loss"] == pytest.approx(two[step]["loss"], rel=2e-3), step
        assert one[step]["grad_norm"] == pytest.approx(two[step]["grad_norm"], rel=3e-2), step


def test_traces_and_tensorboard_events_are_written(launch, config, tmp_path) -> None:
    options = ["--metrics.enable_tensorboard", "true", "--profiling.enable_profiling", "--profiling.profile_freq", "2"]
    succeed(launch("--config", config, "--job.dump_folder", tmp_path, "--training.steps", "4", *options))
    traces = sorted((tmp_path / "profile_traces").rglob("*.json"))
    assert [trace.parent.name for trace in traces] == ["step-2", "step-4"]
    assert json.loads(traces[0].read_text())["traceEvents"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    by_step = {event.step: event.value for event in events.Scalars("train/loss")}
    assert by_step == pytest.approx({step: record["loss"] for step, record in steps(tmp_path).items()})


def test_recomputation_does_not_change_a_bit_in_bf16(launch, config, tmp_path) -> None:
    # On one process: with recomputation the bf16 copies of the weights are FSDP2's, without it our own.
    options = ["--training.steps", "5", "--validation.enable", "false", "--generation.enable", "false"]
    for run in ("none", "full", "selective"):
        succeed(
            launch(
                "--config", config, "--job.dump_folder", tmp_path / run, "--activation_checkpoint.mode", run, *options
            )
        )
    one = [(r["loss"], r["grad_norm"]) for r in steps(tmp_path / "none").values()]
    for mode in ("full", "selective"):
        assert [(r["loss"], r["grad_norm"]) for r in steps(tmp_path / mode).values()] == one, mode


# Resuming


@pytest.mark.parametrize(
    ("nproc", "options"), [(1, []), (4, ["--parallelism.tensor_parallel_degree", "2"])], ids=["1 process", "dp2 × tp2"]
)
def test_stopping_and_resuming_is_bitwise_the_uninterrupted_run(launch, config, tmp_path, nproc, options) -> None:
    common = ["--config", config, "--lr_scheduler.total_steps", "6", "--model.dropout", "0.1", *options]
    common += ["--generation.enable", "false"]
    succeed(launch(*common, "--job.dump_folder", tmp_path / "whole", "--training.steps", "6", nproc=nproc))
    parted = ["--job.dump_folder", tmp_path / "parted"]
    succeed(launch(*common, *parted, "--training.steps", "3", nproc=nproc))
    output = succeed(launch(*common, *parted, "--training.steps", "6", nproc=nproc))
    assert "resuming after step 3" in output

    whole, parted_steps = steps(tmp_path / "whole"), steps(tmp_path / "parted")
    for key in ("loss", "grad_norm", "lr", "batch_hash", "tokens_seen"):
        assert [r[key] for r in parted_steps.values()] == [r[key] for r in whole.values()], key
    expected = weights(tmp_path / "whole" / "checkpoint" / "step-6", tmp_path)
    found = weights(tmp_path / "parted" / "checkpoint" / "step-6", tmp_path)
    assert found.keys() == expected.keys()
    assert any(name.startswith("optimizer.") for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_finished_run_says_so_and_goes_on_when_steps_are_raised(launch, config, one_process) -> None:
    before = (one_process / "metrics.jsonl").read_text()
    output = succeed(launch("--config", config, "--job.dump_folder", one_process, *FP32))
    assert "trained to step 30 already" in output
    assert (one_process / "metrics.jsonl").read_text() == before


def test_fewer_steps_than_are_trained_validate_what_is_there(launch, config, tmp_path) -> None:
    common = ["--config", config, "--job.dump_folder", tmp_path / "run"]
    succeed(launch(*common, "--training.steps", "10", "--validation.enable", "false"))
    # Other documents are trained on now: some are held out.
    validating = ["--checkpoint.allow_changed_data", "true", "--validation.freq", "5", "--training.steps"]
    output = succeed(launch(*common, *validating, "5"))
    assert "validation at step 10" in output
    assert "done: 10 steps" in output
    # Which is kept: it is not done again, and is what a later one is compared with.
    assert "is trained to step 10 already" in succeed(launch(*common, *validating, "5"))
    saved = json.loads((tmp_path / "run" / "checkpoint" / "step-10" / "train_state.json").read_text())["state"]
    assert saved["best_val_loss"] == records(tmp_path / "run")[-1]["val_loss"]
    assert (tmp_path / "run" / "checkpoint" / "best").read_text().strip() == "step-10"


def test_without_checkpoints_a_run_that_has_some_is_left_alone(launch, config, tmp_path) -> None:
    common = ["--config", config, "--job.dump_folder", tmp_path / "run", "--training.steps", "5"]
    succeed(launch(*common, "--validation.freq", "5", "--checkpoint.keep_best", "false"))
    assert not (tmp_path / "run" / "checkpoint" / "best").exists()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    process = launch(*common, "--checkpoint.enable", "false")
    assert process.returncode == 2
    assert "error: checkpoint.enable: false starts from scratch, but" in process.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_damaged_checkpoint_is_skipped_and_named(launch, config, tmp_path) -> None:
    common = ["--config", config, "--job.dump_folder", tmp_path / "run", "--checkpoint.interval", "5"]
    succeed(launch(*common, "--training.steps", "10"))
    shard = next((tmp_path / "run" / "checkpoint" / "step-10").glob("*.distcp"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    output = succeed(launch(*common, "--training.steps", "12"))
    assert "step-10: " + shard.name + " has changed since it was written" in output.replace("\n", " ")
    assert "resuming after step 5" in output
    assert sorted(steps(tmp_path / "run")) == list(range(1, 13))
    assert CheckpointFolder(tmp_path / "run" / "checkpoint").problem(10) is None  # written anew on the way


def test_going_back_to_an_older_step_leaves_the_newer_course_aside(launch, config, tmp_path) -> None:
    common = [
        "--config",
        config,
        "--job.dump_folder",
        tmp_path,
        "--checkpoint.interval",
        "5",
        "--validation.enable",
        "false",
    ]
    succeed(launch(*common, "--training.steps", "10"))
    old = (tmp_path / "checkpoint" / "step-10" / "manifest.json").read_text()
    succeed(launch(*common, "--training.steps", "10", "--checkpoint.load_step", "5", "--optimizer.lr", "1e-2"))
    assert (tmp_path / "checkpoint" / "set-aside-step-10" / "manifest.json").read_text() == old
    new = (tmp_path / "checkpoint" / "step-10" / "manifest.json").read_text()
    assert new != old
    # Once: the same command, as a scheduler gives it again, goes on where that course is.
    back = [*common, "--checkpoint.load_step", "5", "--optimizer.lr", "1e-2"]
    assert "trained to step 10 already" in succeed(launch(*back, "--training.steps", "10"))
    assert "resuming after step 10" in succeed(launch(*back, "--training.steps", "11"))
    assert (tmp_path / "checkpoint" / "step-10" / "manifest.json").read_text() == new
    # Another step is another wish, and nothing that was set aside is lost.
    assert "resuming after step 10" in succeed(
        launch(*common, "--checkpoint.load_step", "10", "--training.steps", "11")
    )
    assert (tmp_path / "checkpoint" / "set-aside-step-10" / "manifest.json").read_text() == old
    assert (tmp_path / "checkpoint" / "set-aside-step-11").exists()


RESUME_MISTAKES = {
    "other model": (["--model.num_hidden_layers", "3"], "model.num_hidden_layers was 2, is 3"),
    "other seed": (["--training.seed", "1"], "training.seed was 0, is 1"),
    "other rows": (["--training.seq_len", "32"], "training.seq_len was 64, is 32"),
    "from scratch": (["--checkpoint.load_step", "0"], "holds checkpoints"),
    "no such step": (["--checkpoint.load_step", "7"], "there is no checkpoint of step 7 (there are: "),
}


@pytest.mark.parametrize("mistake", RESUME_MISTAKES)
def test_a_resume_that_cannot_be_is_refused(launch, config, one_process, mistake: str) -> None:
    options, message = RESUME_MISTAKES[mistake]
    kept = {path: path.stat().st_mtime_ns for path in one_process.rglob("*") if path.is_file()}
    process = launch("--config", config, "--job.dump_folder", one_process, *FP32, "--training.steps", "40", *options)
    assert process.returncode == 2, process.stdout + process.stderr
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert {path: path.stat().st_mtime_ns for path in one_process.rglob("*") if path.is_file()} == kept


# Mistakes and trouble

MISTAKES = {
    "typo": (["--training.step", "3"], "did you mean training.steps?"),
    "string for a number": (["--training.steps", "many"], "must be a whole number"),
    "tp 3 with 8 heads": (["--parallelism.tensor_parallel_degree", "3"], "8 query heads"),
    "missing file": (["--data.paths", "no/such/*.txt"], "no file matches"),
    "empty corpus": (["--data.paths", os.devnull], "no file matches"),
    "world size that does not fit": (["--parallelism.data_parallel_shard_degree", "3"], "there are 2 processes"),
    "pattern of no name": (["--optimizer.no_decay", "embed_tokens"], '"embed_tokens" matches no parameter'),
    "no tokenizer": (["--data.tokenizer", "./nowhere"], "there is no folder ./nowhere"),
}


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message(config, tmp_path, monkeypatch, mistake: str, nproc: int) -> None:
    """Found by what a launch does before any rank starts."""
    monkeypatch.chdir(tmp_path)
    options, message = MISTAKES[mistake]
    message = message.replace("2 processes", f"{nproc} processes")
    overrides = {"--job.dump_folder": "out/run"} | dict(zip(options[::2], options[1::2], strict=True))
    words = [word for pair in overrides.items() for word in pair]

    def start() -> None:
        found = load_config(config, words, world_size=nproc)
        preflight(found, world_size=nproc, say=print)
        CorpusStore.of(found, dp=nproc).get(say=print)

    with pytest.raises(UserError) as raised:
        start()
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


# One is found in reading the configuration, the other in preparing the data: first and last before ranks start.
@pytest.mark.parametrize(("mistake", "nproc"), [("typo", 1), ("no tokenizer", 1), ("no tokenizer", 2)])
def test_a_mistake_ends_a_launch_and_nothing_is_written(launch, config, tmp_path, mistake: str, nproc: int) -> None:
    options, message = MISTAKES[mistake]
    process = launch("--config", config, "--job.dump_folder", "out/run", *options, nproc=nproc, cwd=tmp_path)
    assert process.returncode == 2, process.stdout + process.stderr
    assert message in process.stderr
    assert "Traceback" not in process.stdout + process.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "message"), [("", "corpus is empty"), ("one short line\n", "a row takes 65")])
def test_a_corpus_with_too_little_text_is_refused(launch, config, tmp_path, text: str, message: str) -> None:
    (tmp_path / "corpus.txt").write_text(text)
    process = launch("--config", config, "--job.dump_folder", "out", "--data.paths", "corpus.txt", cwd=tmp_path)
    assert process.returncode == 2
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


def test_a_diverged_run_stops_and_says_so(launch, config, tmp_path) -> None:
    options = ["--optimizer.lr", "1e30", "--lr_scheduler.warmup_steps", "0", "--checkpoint.interval", "1"]
    process = launch("--config", config, "--job.dump_folder", tmp_path, *options)
    assert process.returncode == 1
    assert "was skipped: loss" in process.stdout
    assert "not finite" in process.stdout
    assert "4 steps in a row were skipped (training.max_skipped_steps is 3)" in process.stderr
    assert "Traceback" not in process.stderr
