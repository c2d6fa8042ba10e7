"""Whole runs on streamed corpora: with bad documents, and with changes. Killed: tests/faults/test_killed_streams.py."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpora import write_streamed_mixture

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_streamed_mixture(tmp_path)


def records(run: Path, key: str) -> dict[int, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def succeed(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout + process.stderr


def fail(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stdout + process.stderr
    return process.stderr


def test_bad_documents_are_listed_once_up_to_the_limit(launch: Launch, config: Path, tmp_path: Path) -> None:
    lines = (tmp_path / "2.jsonl").read_bytes().splitlines(keepends=True)
    lines[10] = b'{"text": "cut sho\n'
    lines[20] = b'{"text": "caf\xe9"}\n'
    lines[30] = b'{"txt": "no such key"}\n'
    (tmp_path / "2.jsonl").write_bytes(b"".join(lines))
    run = tmp_path / "run"
    arguments = ["--config", config, "--job.dump_folder", run, "--checkpoint.interval", "30"]
    # Enough steps that the file is read more than once.
    output = succeed(launch(*arguments, "--training.steps", "60", "--data.mixture", mixture(tmp_path)))
    assert "so far, 3 documents cannot be read" in output.replace("\n", " ")
    listed = [json.loads(line) for line in (run / "data_errors.jsonl").read_text().splitlines()]
    assert sorted((Path(entry["file"]).name, entry["line"]) for entry in listed) == [
        ("2.jsonl", 11),
        ("2.jsonl", 21),
        ("2.jsonl", 31),
    ]
    error = fail(launch(*arguments, "--data.max_bad_documents", 2, "--job.dump_folder", tmp_path / "other",
                        "--training.steps", "60", "--data.mixture", mixture(tmp_path)))  # fmt: skip
    assert "data.max_bad_documents is 2" in error
    assert "2.jsonl, line " in error


def mixture(folder: Path) -> str:
    """The mixture, with the bad file alone in one corpus, so that few steps read all of it."""
    good = f'{{name = "table", weight = 1.0, dataset = "files", paths = ["{folder / "table.parquet"}"]}}'
    bad = f'{{name = "lines", weight = 2.0, dataset = "files", paths = ["{folder / "2.jsonl"}"]}}'
    return f"[{bad}, {good}]"


def test_a_changed_corpus_is_refused_unless_it_is_allowed(launch: Launch, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["--config", config, "--job.dump_folder", run]
    succeed(launch(*arguments, "--training.steps", 4))
    os.utime(tmp_path / "1.jsonl")  # touched, and the same
    succeed(launch(*arguments, "--training.steps", 5))
    with (tmp_path / "1.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    error = fail(launch(*arguments, "--training.steps", 8))
    assert "the corpus's files changed" in error
    assert "--checkpoint.allow_changed_data" in error
    output = succeed(launch(*arguments, "--training.steps", 8, "--checkpoint.allow_changed_data"))
    assert "resuming after step 5" in output
    assert "content of the data changed" in output
    error = fail(launch(*arguments, "--training.steps", 9, "--data.packing", "concat"))
    assert "data.packing was best_fit, is concat" in error
