"""A power cut at any moment of a run: what the disk may hold then is always resumed from, and nothing saved is lost."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from tests.conftest import ENVIRONMENT, ROOT, Python
from torchtitan_style.checkpoint.folder import CheckpointFolder

from .disk import Disk, Node, write_out
from .trace import record, why_no_trace

pytestmark = pytest.mark.skipif(bool(why_no_trace()), reason=f"system calls cannot be recorded: {why_no_trace()}")

RUN = [
    "-m", "torchtitan_style", "train", "--config", str(ROOT / "train_configs/qwen3.toml"), "--model.flavor", "debug",
    "--data.dataset", "files", "--data.paths", "corpus/*.txt", "--training.seq_len", "16", "--training.steps", "6",
    "--training.global_batch_size", "2", "--validation.freq", "2", "--validation.steps", "1", "--metrics.log_freq", "1",
    "--generation.max_new_tokens", "2", "--checkpoint.interval", "2", "--checkpoint.keep_latest_k", "2",
    "--job.dump_folder", "run",
]  # fmt: skip


@dataclass
class Recorded:
    """A run that nothing happened to, operation by operation."""

    disk: Disk
    folder: Path

    def saved(self, count: int) -> int:
        """The newest checkpoint that the run has said it saved within its first ``count`` operations; 0 if none."""
        said = [
            int(m) for o in self.disk.operations[:count] for m in re.findall(rb'"checkpoint", "step": (\d+)', o.data)
        ]
        return max(said, default=0)

    def manifest(self, step: int) -> bytes:
        """The last content that manifest.json of ``step`` was given."""
        found = [
            o for o in self.disk.operations if o.kind == "write" and b'"files"' in o.data and _step(o.data) == step
        ]
        assert found, step
        return found[-1].data


def _step(manifest: bytes) -> int:
    try:
        return int(json.loads(manifest)["step"])
    except (ValueError, KeyError):
        return -1


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("recorded")
    _corpus(folder)
    log = tmp_path_factory.mktemp("log") / "calls"
    disk = record([sys.executable, *RUN], folder=folder, log=log, environment=ENVIRONMENT)
    shutil.rmtree(log)
    recorded = Recorded(disk, folder)
    assert recorded.saved(len(disk.operations)) == 6
    return recorded


def _corpus(folder: Path) -> None:
    (folder / "corpus").mkdir()
    random = Random(0)
    for number in range(3):
        words = (f"{random.choice('abcdefgh')}{random.randrange(30)}" for _ in range(900))
        (folder / f"corpus/{number}.txt").write_text(" ".join(words), encoding="utf-8")


def test_what_was_recorded_is_what_the_run_has_left(recorded: Recorded, tmp_path: Path) -> None:
    """The model of the disk is right: after all operations it holds what the real folder holds."""
    states = recorded.disk.states(len(recorded.disk.operations), random=Random(0), samples=0)
    _, everything = next(states)
    write_out(everything, tmp_path / "all")
    for path in (recorded.folder / "run").rglob("*"):
        same = tmp_path / "all" / path.relative_to(recorded.folder)
        if path.is_file() and "tensorboard" not in path.parts:
            assert same.read_bytes() == path.read_bytes(), path


def _states(recorded: Recorded, number: int, seed: int, samples: int) -> Iterator[tuple[int, str, list[Node]]]:
    """States after cuts at ``number`` moments."""
    random = Random(seed)
    moments = range(1, len(recorded.disk.operations) + 1)
    for count in sorted(random.sample(moments, min(number, len(moments)))):
        for description, nodes in recorded.disk.states(count, random=random, samples=samples):
            yield count, description, nodes


@pytest.mark.parametrize(
    ("moments", "samples"), [(60, 1), pytest.param(10**6, 4, marks=pytest.mark.nightly)], ids=["some", "all"]
)
def test_the_newest_checkpoint_is_found_whole(recorded: Recorded, tmp_path: Path, moments: int, samples: int) -> None:
    tried = 0
    for count, description, nodes in _states(recorded, moments, 1, samples):
        folder = tmp_path / "state"
        write_out(nodes, folder)
        found = None
        if (folder / "run/checkpoint").exists():
            found = CheckpointFolder(folder / "run/checkpoint").newest_verified(lambda text: None)
        least = recorded.saved(count)
        assert (found or 0) >= least, f"after {count} operations, {description}: {found}, but {least} was saved"
        if found:
            manifest = (folder / f"run/checkpoint/step-{found}/manifest.json").read_bytes()
            assert manifest == recorded.manifest(found), f"after {count} operations, {description}"
        shutil.rmtree(folder)
        tried += 1
    assert tried > 2 * min(moments, 100)
    print(f"{tried} states of the disk")


@pytest.mark.parametrize(
    "moments", [pytest.param(2, id="some"), pytest.param(60, marks=pytest.mark.nightly, id="many")]
)
def test_the_run_goes_on(recorded: Recorded, python: Python, tmp_path: Path, moments: int) -> None:
    """The same command resumes from whatever is left, and has the curve of the run that nothing happened to."""
    expected = _curve(recorded.folder)
    random = Random(moments)
    for count, description, nodes in _states(recorded, moments, 2, 1):
        if (moments == 2 and description.startswith(("everything", "half"))) or random.random() < 0.5:
            continue
        folder = tmp_path / "state"
        write_out(nodes, folder)
        shutil.copytree(recorded.folder / "corpus", folder / "corpus", dirs_exist_ok=True)
        done = python(*RUN, cwd=folder)
        assert done.returncode == 0, f"after {count} operations, {description}: {done.stdout}{done.stderr}"
        assert _curve(folder) == expected, f"after {count} operations, {description}"
        shutil.rmtree(folder)


def _curve(folder: Path) -> dict[int, tuple[float, str]]:
    lines = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: (r["loss"], r["batch_hash"]) for r in records if "batch_hash" in r}
