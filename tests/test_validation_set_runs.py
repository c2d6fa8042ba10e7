"""Runs with further held-out sets: their figures, the best checkpoint, and what may change between two starts."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from transformers import AutoModelForCausalLM

from tests.data.corpora import words, write_jsonl
from torchtitan_style.__main__ import main
from torchtitan_style.checkpoint.hf_export import export_hf
from torchtitan_style.checkpoint.saved import SavedModel
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer

Launch = Callable[..., subprocess.CompletedProcess[str]]
SEQ_LEN = 64


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets of several rows, of less than a row, and of conversations."""
    folder = tmp_path_factory.mktemp("sets")
    documents = words(200, lengths=(20, 200))
    write_jsonl(folder / "corpus.jsonl", documents)
    write_jsonl(folder / "more.jsonl", documents[::10])
    (folder / "tiny.txt").write_text("naïve loss 学习 🙂 gradient token")
    talk = [{"role": "user", "content": "token?"}, {"role": "assistant", "content": "mesh shard step"}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 7)
    settings = {
        "model": {"flavor": "debug"},
        "data": {"dataset": "files", "paths": [str(folder / "corpus.jsonl")]},
        "training": {
            "steps": 4,
            "seq_len": SEQ_LEN,
            "global_batch_size": 8,
            "local_batch_size": -1,
            "mixed_precision_param": "float32",
        },
        "lr_scheduler": {"total_steps": 8},
        "checkpoint": {"interval": 4, "best_metric": "val_loss/more"},
        "validation": {
            "freq": 4,
            "steps": 1,
            "sets": [
                {"name": "tiny", "paths": [str(folder / "tiny.txt")]},
                {"name": "more", "paths": [str(folder / "more.jsonl")]},
                {"name": "chat", "paths": [str(folder / "chat.jsonl")], "format": "chat"},
            ],
        },
        "generation": {"enable": False},
        "metrics": {"enable_tensorboard": True},
    }
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(settings))
    return path


def validations(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line.pop("step"): line for line in lines if "val_loss/more" in line}
    return {step: {key: value for key, value in line.items() if key != "time"} for step, line in found.items()}


def succeed(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout


@pytest.fixture(scope="module")
def run(launch: Launch, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    output = succeed(launch("--config", config, "--job.dump_folder", folder))
    [line] = [line for line in output.splitlines() if "best so far" in line]
    assert line.split()[:2] == ["more", "loss"]
    assert "  tiny    loss " in output
    return folder


def figures_of(model: Any, rows: torch.Tensor, num_bytes: int) -> tuple[float, float, float]:
    """Loss, accuracy and bits per byte: rows [n, seq_len + 1], -100 where there is nothing."""
    with torch.no_grad():
        logits = model(rows[:, :-1].clamp(min=0)).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
    count = int((rows[:, 1:] != -100).sum())
    right = int((logits.argmax(-1) == rows[:, 1:]).sum())
    return float(losses) / count, right / count, float(losses) / math.log(2) / num_bytes


def test_the_figures_of_each_set_are_those_of_transformers(config: Path, run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoint" / "step-4"
    export_hf(SavedModel(checkpoint), tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = Tokenizer(run / "tokenizer")
    sets = {
        "more": [json.loads(line)["text"] for line in config.with_name("more.jsonl").read_text().splitlines()],
        "tiny": [config.with_name("tiny.txt").read_text()],
    }
    for name, documents in sets.items():
        ids = [tokenizer.end_of_text]
        for document in documents:
            ids += [*tokenizer.encode(document), tokenizer.end_of_text]
        starts = range(0, len(ids) - 1, SEQ_LEN)
        rows = [torch.tensor(ids[start : start + SEQ_LEN + 1]) for start in starts]
        padded = torch.nn.utils.rnn.pad_sequence([*rows, torch.zeros(SEQ_LEN + 1, dtype=torch.long)], True, -100)[:-1]
        loss, accuracy, bits = figures_of(model, padded, sum(len(document.encode()) for document in documents))
        found = validations(run)[4]
        assert found[f"val_loss/{name}"] == pytest.approx(loss, rel=1e-5)
        assert found[f"val_perplexity/{name}"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert found[f"val_accuracy/{name}"] == pytest.approx(accuracy, abs=1e-9)
        assert found[f"val_bits_per_byte/{name}"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize(
    ("nproc", "options"),
    [
        (4, ["--parallelism.pipeline_parallel_degree", "2", "--training.local_batch_size", "2"]),
        pytest.param(2, ["--parallelism.tensor_parallel_degree", "2"], marks=pytest.mark.nightly),
        pytest.param(2, ["--parallelism.context_parallel_degree", "2"], marks=pytest.mark.nightly),
    ],
    ids=["dp2 × pp2", "tp2", "cp2"],
)
def test_every_layout_has_the_same_figures(
    launch: Launch, config: Path, run: Path, tmp_path: Path, nproc: int, options: list[str]
) -> None:
    succeed(launch("--config", config, "--job.dump_folder", tmp_path, *options, nproc=nproc))
    for step, expected in validations(run).items():
        assert validations(tmp_path)[step] == pytest.approx(expected, rel=1e-5), step


def test_tensorboard_has_them(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    expected = {step: line["val_bits_per_byte/tiny"] for step, line in validations(run).items()}
    found = {event.step: event.value for event in events.Scalars("validation/val_bits_per_byte/tiny")}
    assert found == pytest.approx(expected)


def test_a_moved_run_resumes_unless_a_set_has_changed(launch: Launch, config: Path, run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    before = (moved / "validation_sets" / "more" / "manifest.json").stat().st_mtime_ns
    line = ["--config", config, "--job.dump_folder", moved, "--training.steps"]
    succeed(launch(*line, 5))
    assert (moved / "validation_sets" / "more" / "manifest.json").stat().st_mtime_ns == before
    saved = json.loads((moved / "checkpoint" / "step-5" / "train_state.json").read_text())["state"]
    assert saved["best_val_loss"] == min(line["val_loss/more"] for line in validations(moved).values())

    # The set is of other documents: refused, or prepared again, and then earlier losses say nothing about the best.
    write_jsonl(tmp_path / "others.jsonl", ["🙂 other words than ever before"] * 3)
    text = config.read_text().replace("more.jsonl", "others.jsonl").replace(str(config.parent), str(tmp_path))
    (tmp_path / "changed.toml").write_text(text)
    for name in ("corpus.jsonl", "tiny.txt", "chat.jsonl"):
        shutil.copy2(config.with_name(name), tmp_path)
    line[1] = tmp_path / "changed.toml"
    refused = launch(*line, 6)
    assert refused.returncode == 2
    assert "validation.sets: more: the corpus's files changed" in refused.stderr
    assert "Traceback" not in refused.stderr
    output = succeed(launch(*line, 6, "--checkpoint.allow_changed_data"))
    assert "validation set more: 3 documents" in output
    assert "(best so far)" in output
    assert (moved / "checkpoint" / "best").read_text().strip() == "step-6"


def test_sets_alone_are_validated_where_nothing_else_is_held_out(
    launch: Launch, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data.validation_fraction", 0, "--training.steps", 1, "--data.packing", "best_fit"]
    succeed(launch("--config", config, "--job.dump_folder", tmp_path, *options, "--data.document_mask"))
    found = validations(tmp_path)[1]
    assert "val_loss" not in found
    assert all(math.isfinite(value) for value in found.values())
    assert len(found) == 12

    # Conversations by themselves have the figures that `eval` gives; the set was rendered in ChatML, which stood in.
    model = tmp_path / "hf"
    export_hf(SavedModel(tmp_path / "checkpoint" / "step-1"), model)
    shutil.copy2(tmp_path / "validation_sets" / "chat" / "tokenizer" / "chat_template.jinja", model)
    data = ["--data", str(config.with_name("chat.jsonl")), "--format", "chat"]
    main(["eval", "--checkpoint", str(model), *data, "--dtype", "float32", "--json"])
    figures = json.loads(capsys.readouterr().out)["total"]
    for name in ("loss", "perplexity", "bits_per_byte", "accuracy"):
        assert figures[name] == pytest.approx(found[f"val_{name}/chat"], rel=1e-5), name
