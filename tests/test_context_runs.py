"""Runs whose rows are shared out over ranks: the curve of one process, resumed on other layouts, and what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchtitan_style.checkpoint.manifest import read_manifest

CP, TP = "--parallelism.context_parallel_degree", "--parallelism.tensor_parallel_degree"
PP = "--parallelism.pipeline_parallel_degree"
DEBUG = [
    *("--model.flavor", "debug", "--training.seq_len", 64, "--training.mixed_precision_param", "float32"),
    *("--training.global_batch_size", 4, "--training.local_batch_size", -1, "--lr_scheduler.total_steps", 30),
    *("--data.packing", "best_fit", "--data.document_mask", "true", "--metrics.enable_tensorboard", "false"),
    *("--validation.steps", 3, "--validation.freq", 6, "--generation.max_new_tokens", 4, "--checkpoint.interval", 6),
]
TEXT = "def word(number):\n    return number * {}\n\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):  # of very different lengths
        (folder / f"{number}.txt").write_text("".join(TEXT.format(i * number) for i in range(1 + number % 7 * number)))
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def values(folder: Path, key: str) -> dict[int, Any]:
    return {record["step"]: record[key] for record in records(folder) if key in record}


def test_a_run_goes_on_with_and_without_shared_rows(launch, python, corpus: Path, tmp_path: Path) -> None:
    data = ["--data.dataset", "files", "--data.paths", json.dumps([f"{corpus}/*.txt"])]
    data += ["--data.prepared_folder", tmp_path / "prepared"]

    def train(name: str, steps: int, *more: object, nproc: int) -> Path:
        line = [*DEBUG, *data, "--training.steps", steps, "--job.dump_folder", tmp_path / name, *more]
        done = launch(*line, nproc=nproc)
        assert done.returncode == 0, done.stdout + done.stderr
        return tmp_path / name

    whole = train("whole", 18, nproc=1)
    train("run", 6, CP, 2, PP, 2, "--training.local_batch_size", 2, nproc=4)
    train("run", 12, CP, 2, TP, 2, nproc=4)
    run = train("run", 18, nproc=2)
    for key in ("batch_hash", "lr", "tokens_seen", "padding_share"):
        assert values(run, key) == values(whole, key)
    for key in ("loss", "grad_norm", "val_loss", "val_accuracy"):
        for step, right in values(whole, key).items():
            assert values(run, key)[step] == pytest.approx(right, rel=1e-5), (key, step)

    checkpoint = run / "checkpoint/step-12"
    assert read_manifest(checkpoint).mesh["cp"] == 2
    shown = python("-m", "torchtitan_style", "checkpoint", "show", checkpoint)
    assert "cp 2" in shown.stdout, shown.stdout + shown.stderr
    exported = python(
        "-m", "torchtitan_style", "export-hf", "--checkpoint", checkpoint, "--output", tmp_path / "exported"
    )
    assert exported.returncode == 0, exported.stderr
    text = python(
        "-m", "torchtitan_style", "generate", "--checkpoint", checkpoint, "--prompt", "def", "--max-new-tokens", 2
    )
    assert text.returncode == 0, text.stderr
