"""Signals to stop while a run starts: during its imports, while the data is prepared, and as the ranks begin."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ENVIRONMENT, ROOT
from tests.faults.runs import write_corpus

# Python imports it as it starts. A signal comes as a module is imported: a moment that no machine is too slow for.
SITECUSTOMIZE = """
import os, signal, sys

def tell():
    if not os.path.exists(os.environ["TOLD_MARK"]):
        open(os.environ["TOLD_MARK"], "w").close()
        os.kill(os.getpid(), int(os.environ["TOLD_SIGNAL"]))

class Finder:
    def find_spec(self, name, *_):
        if name == os.environ["TOLD_AT"]:
            tell()

if os.environ.get("RANK", "launcher") == os.environ["TOLD_RANK"]:
    sys.meta_path.insert(0, Finder())
    if os.environ["TOLD_AT"] == "the interpreter":
        tell()
"""


def start(folder: Path, number: signal.Signals, at: str, *options: object, nproc: int, rank: int | None = None) -> Any:
    folder.mkdir()
    write_corpus(folder)
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    environment = ENVIRONMENT | {
        "PYTHONPATH": f"{folder}:{ROOT}",
        "NPROC": str(nproc),
        "TOLD_SIGNAL": str(int(number)),
        "TOLD_AT": at,
        "TOLD_RANK": "launcher" if rank is None else str(rank),
        "TOLD_MARK": str(folder / "told"),
    }
    line = [sys.executable, "-m", "torchtitan_style.launch", "--config", str(folder / "config.toml")]
    line += ["--job.dump_folder", str(folder / "run"), *map(str, options)]
    # Ctrl-C may be ignored here, as in all that a shell starts in the background.
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=200,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    assert (folder / "told").exists()
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.mark.parametrize(
    ("nproc", "at", "number"),
    [
        *(
            (nproc, at, number)
            for nproc, at in (
                (1, "pydantic"),  # the configuration is not read yet
                (1, "torch._utils"),  # in the middle of importing torch, which an exception would abort
                (1, "torchtitan_style.data.prepare.store"),
                (2, "torchtitan_style.data.prepare.build"),
                (2, "torch.distributed.run"),
            )
            for number in (signal.SIGTERM, signal.SIGINT)
        ),
        (1, "pydantic", signal.SIGUSR1),
        (2, "pydantic", signal.SIGUSR1),
    ],
)
def test_a_run_that_is_told_to_stop_while_it_starts_leaves_word(
    tmp_path: Path, nproc: int, at: str, number: signal.Signals
) -> None:
    done = start(tmp_path / "here", number, at, nproc=nproc)
    word = tmp_path / "here/run/preempted.json"
    if number == signal.SIGINT:
        assert done.returncode == 130, done.stderr
        assert not word.exists()
        return
    assert done.returncode == 0, done.stderr
    found = json.loads(word.read_text())
    assert (found["step"], found["checkpoint"], found["signal"]) == (0, None, number.name)


@pytest.mark.parametrize("at", ["the interpreter", pytest.param("torch._utils", marks=pytest.mark.nightly)])
def test_all_ranks_stop_if_one_is_told_to_while_it_starts(tmp_path: Path, at: str) -> None:
    """Before it has handlers too: the launcher has ranks start with the signals blocked."""
    done = start(tmp_path / "here", signal.SIGUSR1, at, nproc=2, rank=1)
    assert done.returncode == 0, done.stderr
    assert "stopped before the first step by SIGUSR1" in done.stdout
    found = json.loads((tmp_path / "here/run/preempted.json").read_text())
    assert (found["step"], found["checkpoint"], found["signal"]) == (0, None, "SIGUSR1")


def test_a_mistake_of_a_run_that_is_told_to_stop_is_still_a_mistake(tmp_path: Path) -> None:
    """A scheduler must not start it again."""
    done = start(tmp_path / "here", signal.SIGTERM, "pydantic", "--training.steps", "none", nproc=1)
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "here/run").exists()
