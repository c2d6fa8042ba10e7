"""Checkpoints that were damaged, or made to do harm: named and not taken, before any weight is touched."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import Command, Runs, steps
from torchtitan_style.checkpoint.manifest import MANIFEST, _digest, file_entry, problem_of

SHARD = "__0_0.distcp"
TRAIN_STATE = "train_state.json"


def cut(name: str, keep: Callable[[int], int]) -> Callable[[Path, Path], None]:
    def damage(checkpoint: Path, _: Path) -> None:
        path = checkpoint / name
        os.truncate(path, keep(path.stat().st_size))

    return damage


def flip(name: str, where: float) -> Callable[[Path, Path], None]:
    """One bit, so far into the file."""

    def damage(checkpoint: Path, _: Path) -> None:
        raw = bytearray((checkpoint / name).read_bytes())
        raw[int(len(raw) * where)] ^= 1
        (checkpoint / name).write_bytes(raw)

    return damage


class Malicious:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def plant(name: str, *, forge: bool) -> Callable[[Path, Path], None]:
    """A file that makes ``canary`` when it is unpickled; forge: with a manifest that fits it."""

    def damage(checkpoint: Path, canary: Path) -> None:
        (checkpoint / name).write_bytes(pickle.dumps(Malicious(canary)))
        if forge:
            forge_manifest(checkpoint, name)

    return damage


def forge_manifest(checkpoint: Path, name: str) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = file_entry(checkpoint / name)
    manifest["manifest_sha256"] = _digest(manifest)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert problem_of(checkpoint) is None


DAMAGE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "shard cut by a byte": (cut(SHARD, lambda size: size - 1), f"{SHARD} has "),
    "shard cut to 60%": (cut(SHARD, lambda size: size * 6 // 10), f"{SHARD} has "),
    "shard emptied": (cut(SHARD, lambda size: 0), f"{SHARD} has 0 bytes instead of "),
    "shard deleted": (lambda checkpoint, _: (checkpoint / SHARD).unlink(), f"{SHARD} is missing"),
    "bit of a shard": (flip(SHARD, 0.7), f"{SHARD} has changed since it was written"),
    "bit of the metadata": (flip(".metadata", 0.5), ".metadata has changed since it was written"),
    "bit of the manifest": (flip(MANIFEST, 0.5), f"{MANIFEST} "),
    "malicious metadata": (plant(".metadata", forge=False), ".metadata has "),
    "malicious train state": (plant(TRAIN_STATE, forge=False), f"{TRAIN_STATE} has "),
    "malicious shard": (plant(SHARD, forge=False), f"{SHARD} has "),
}
FORGED: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "metadata": (plant(".metadata", forge=True), ".metadata: not the metadata of a checkpoint: it names "),
    "shard": (plant(SHARD, forge=True), "cannot be loaded: rank 0: "),
}


def test_real_files_that_are_damaged_are_not_read(command: Command, tmp_path: Path) -> None:
    command("tests.faults.checkpoints", "make", tmp_path / "made")
    cases = {**DAMAGE, **{f"forged {name}": case for name, case in FORGED.items()}}
    folders = {name: tmp_path / name.replace(" ", "-") for name in cases}
    for name, (damage, _) in cases.items():
        shutil.copytree(tmp_path / "made", folders[name])
        damage(folders[name] / "checkpoint/step-2", tmp_path / "canary")
    output = command("tests.faults.checkpoints", "open", tmp_path / "made", *folders.values())
    assert not (tmp_path / "canary").exists()
    whole, *found = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
    assert whole == {"found": 2, "error": None, "said": [], "loaded": ["step-2"]}
    for (name, (_, message)), result in zip(cases.items(), found, strict=True):
        path = folders[name] / "checkpoint/step-2"
        if name in DAMAGE:
            assert result | {"said": []} == {"found": 1, "error": None, "said": [], "loaded": ["step-1"]}, name
            assert len(result["said"]) == 1, name
            assert result["said"][0].startswith(f"skipping the checkpoint {path}: {message}"), name
        else:  # the manifest says that all is well
            assert result["found"] == 2
            assert f"{path}" in result["error"], name
            assert message in result["error"], name
    # The canary is a real one: an ordinary unpickler makes it.
    pickle.loads((folders["malicious metadata"] / "checkpoint/step-2/.metadata").read_bytes())
    assert (tmp_path / "canary").exists()


FORGED_STATES: dict[str, Callable[[Path, Path], None]] = {
    "a pickle": plant(TRAIN_STATE, forge=True),
    "not JSON": lambda path, _: (path / TRAIN_STATE).write_text("{"),
    "a list": lambda path, _: (path / TRAIN_STATE).write_text("[]"),
    "other fields": lambda path, _: (path / TRAIN_STATE).write_text('{"state": {"step": 4}, "identity": {}, "x": 1}'),
    "state of another kind": lambda path, _: rewrite(path, lambda saved: saved["state"].update(unheard_of=1)),
    "no step": lambda path, _: rewrite(path, lambda saved: saved.pop("state")),
}


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    saved = json.loads((path / TRAIN_STATE).read_text())
    change(saved)
    (path / TRAIN_STATE).write_text(json.dumps(saved))


@pytest.fixture(scope="module")
def short(shared: Runs) -> Path:
    """A run of four steps, with a checkpoint at each second one."""
    return shared("short", "--training.steps", 4, "--checkpoint.interval", 2).folder


@pytest.mark.parametrize("name", FORGED_STATES)
def test_a_forged_train_state_is_refused(runs: Runs, short: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(short, folder)
    checkpoint = folder / "checkpoint/step-4"
    FORGED_STATES[name](checkpoint, tmp_path / "canary")
    forge_manifest(checkpoint, TRAIN_STATE)
    run = runs(folder, "--training.steps", 6, status=2)
    assert f"error: {checkpoint}" in run.output
    assert "Traceback" not in run.output
    assert not (tmp_path / "canary").exists()


def test_a_run_skips_what_is_damaged_and_goes_on(runs: Runs, short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(short, folder)
    plant(".metadata", forge=False)(folder / "checkpoint/step-4", tmp_path / "canary")
    run = runs(folder, "--training.steps", 6, nproc=2)
    assert f"skipping the checkpoint {folder / 'checkpoint/step-4'}: .metadata has " in run.output
    assert "resuming after step 2" in run.output
    assert sorted(steps(folder)) == list(range(1, 7))
    assert not (tmp_path / "canary").exists()


def test_a_mistake_is_said_once_and_not_tried_again(runs: Runs, short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(short, folder)
    plant(".metadata", forge=True)(folder / "checkpoint/step-4", tmp_path / "canary")
    run = runs(folder, "--training.steps", 6, "--max-restarts", 3, nproc=2, status=2)
    assert run.output.count("error:") == 1
    assert (
        ".metadata: not the metadata of a checkpoint: it names posix.mkdir, which is not allowed in a checkpoint"
        in run.output
    )
    assert run.output.count("checkpoints take") == 1
    assert not (tmp_path / "canary").exists()
