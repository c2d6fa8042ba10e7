"""Whole runs on streamed corpora: killed and resumed with other ranks and workers, with bad documents, with changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.conftest import ENVIRONMENT
from tests.data.corpora import texts, write_jsonl, write_parquet

Launch = Callable[..., subprocess.CompletedProcess[str]]

STEPS = 120


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A streamed mixture, packed without cutting documents, with a document mask."""
    for number in range(4):
        write_jsonl(tmp_path / f"{number}.jsonl", texts(120, seed=number))
    write_parquet(tmp_path / "table.parquet", texts(400, seed=9))
    entry = {"dataset": "files"}
    settings = {
        "model": {"flavor": "debug"},
        "data": {
            "dataset": "mixture",
            "mixture": [
                {"name": "lines", "weight": 2, "paths": [str(tmp_path / "?.jsonl")]} | entry,
                {"name": "table", "weight": 1, "paths": [str(tmp_path / "table.parquet")]} | entry,
            ],
            "streaming": True,
            "packing": "best_fit",
            "document_mask": True,
        },
        "training": {
            "steps": STEPS,
            "seq_len": 64,
            "global_batch_size": 4,
            "local_batch_size": -1,
            "mixed_precision_param": "float32",
        },
        "optimizer": {"lr": 1e-4},
        "lr_scheduler": {"warmup_steps": 5, "total_steps": STEPS},
        "checkpoint": {"interval": 20},
        "validation": {"freq": 1000, "steps": 2},
        "generation": {"enable": False},
        "metrics": {"enable_tensorboard": False, "log_freq": 10},
    }
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(settings))
    return path


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


def kill_after(arguments: list[Any], run: Path, *, step: int, nproc: int) -> None:
    """Start training, and kill all its processes once ``step`` is recorded."""
    command = [sys.executable, "-m", "torchtitan_style.launch", *map(str, arguments)]
    environment = ENVIRONMENT | {"NPROC": str(nproc)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and max(records(run, "loss"), default=0) >= step:
            break
        time.sleep(0.02)
    assert process.poll() is None, "it was killed while it ran"
    for pid in family(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(member for child in children for member in family(int(child)))]


def test_a_killed_run_goes_on_with_other_ranks_and_workers(launch: Launch, config: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    succeed(launch("--config", config, "--job.dump_folder", whole))
    arguments = ["--config", config, "--job.dump_folder", killed]
    kill_after([*arguments, "--data.num_workers", "1"], killed, step=30, nproc=2)
    output = succeed(launch(*arguments, "--data.num_workers", "2"))
    assert "resuming after step" in output
    assert records(killed, "batch_hash") == records(whole, "batch_hash")
    assert records(killed, "loss") == pytest.approx(records(whole, "loss"), rel=1e-4)
    assert records(killed, "val_loss")[STEPS] == pytest.approx(records(whole, "val_loss")[STEPS], rel=1e-4)
    for name, share in (("lines", 2 / 3), ("table", 1 / 3)):
        found = records(whole, f"share_{name}")
        assert sum(found.values()) / STEPS == pytest.approx(share, abs=0.03)
    assert 0 < sum(records(whole, "padding_share").values()) / STEPS < 0.1

    fitting = fail(launch(*arguments, "--training.steps", STEPS + 1, nproc=3))
    assert "4 rows cannot be shared out evenly over 3" in fitting


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
