"""Which checkpoints are whole, which is taken, and which are deleted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from torchtitan_style.checkpoint.folder import CheckpointFolder


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoint")


def save(folder: CheckpointFolder, *steps: int) -> None:
    for step in steps:
        temporary = folder.begin(step)
        for name in (".metadata", "__0_0.distcp", "shard-b.distcp"):
            (temporary / name).write_bytes(f"{name} of {step}".encode().ljust(1000))
        folder.commit(step, {"step": step, "loss": 1 / step})


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.root.iterdir())


def test_an_empty_or_missing_folder_has_no_checkpoint(folder: CheckpointFolder) -> None:
    said: list[str] = []
    assert (folder.steps(), folder.newest_verified(said.append), folder.best()) == ([], None, None)
    folder.root.mkdir()
    assert (folder.steps(), folder.newest_verified(said.append), folder.best()) == ([], None, None)
    folder.retain(1, pytest.fail)
    folder.remove_unfinished()
    assert said == []


def test_a_committed_checkpoint_is_whole_and_has_its_state(folder: CheckpointFolder) -> None:
    save(folder, 5)
    assert names(folder) == ["step-5"]
    assert folder.problem(5) is None
    assert folder.train_state(5) == {"step": 5, "loss": 1 / 5}
    assert set(json.loads((folder.path(5) / "manifest.json").read_text())["files"]) == {
        ".metadata",
        "__0_0.distcp",
        "shard-b.distcp",
        "train_state.json",
    }


def test_the_newest_is_by_number_and_not_by_name_or_time(folder: CheckpointFolder) -> None:
    save(folder, 100, 9, 20)
    assert folder.steps() == [100, 20, 9]
    assert folder.newest_verified(pytest.fail) == 100


def test_other_things_in_the_folder_are_ignored(folder: CheckpointFolder) -> None:
    save(folder, 5)
    (folder.root / "step-9").write_text("a file")
    for name in ("step-", "step-x", "step-8.bak", "notes"):
        (folder.root / name).mkdir()
    assert folder.steps() == [5]


def change(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(edit(content))
        assert edit(content) != content

    return damage


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "byte cut off": (change("__0_0.distcp", lambda c: c[:-1]), "__0_0.distcp has 999 bytes instead of 1000"),
    "byte added": (change("__0_0.distcp", lambda c: c + b"x"), "__0_0.distcp has 1001 bytes instead of 1000"),
    "bit flipped": (change("shard-b.distcp", flip), "shard-b.distcp has changed since it was written"),
    "file emptied": (change(".metadata", lambda c: b""), ".metadata has 0 bytes"),
    "file deleted": (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "state changed": (change("train_state.json", flip), "train_state.json has changed since it was written"),
    "manifest deleted": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest emptied": (change("manifest.json", lambda c: b""), "manifest.json cannot be read"),
    "manifest cut": (change("manifest.json", lambda c: c[: len(c) // 2]), "manifest.json cannot be read"),
    "manifest not UTF-8": (change("manifest.json", lambda c: b"\xff" + c), "manifest.json cannot be read"),
    "manifest without files": (change("manifest.json", lambda c: b"{}"), "manifest.json cannot be read"),
    "manifest of another kind": (change("manifest.json", lambda c: b"[1]"), "manifest.json cannot be read"),
    "manifest with a list": (change("manifest.json", lambda c: b'{"files": [1]}'), "manifest.json cannot be read"),
    "manifest with numbers": (
        change("manifest.json", lambda c: b'{"manifest_sha256": "0", "files": {".metadata": 3}}'),
        "manifest.json has changed since it was written",
    ),
    "manifest that lists nothing": (change("manifest.json", lambda c: b'{"files": {}}'), "manifest.json"),
    "checksum changed": (
        change("manifest.json", lambda c: c.replace(b'"sha256": "', b'"sha256": "0')),
        "manifest.json has changed since it was written",
    ),
    "step changed": (
        change("manifest.json", lambda c: c.replace(b'"step": 30', b'"step": 31')),
        "manifest.json has changed",
    ),
    "manifest from before": (
        change("manifest.json", lambda c: re.sub(rb',\s*"manifest_sha256": "\w+"', b"", c)),
        "manifest.json has no hash of itself",
    ),
    "shard added": (lambda p: (p / "__9_0.distcp").write_bytes(b"x"), "__9_0.distcp is not in manifest.json"),
}


@pytest.mark.parametrize(("damage", "problem"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_the_next_older_checkpoint_taken(
    folder: CheckpointFolder, damage: Callable[[Path], None], problem: str
) -> None:
    save(folder, 10, 20, 30)
    damage(folder.path(30))
    assert problem in str(folder.problem(30))
    said: list[str] = []
    assert folder.newest_verified(said.append) == 20
    assert len(said) == 1
    assert said[0].startswith(f"skipping the checkpoint {folder.path(30)}: ")
    assert problem in said[0]


def test_no_checkpoint_is_taken_when_all_are_damaged(folder: CheckpointFolder) -> None:
    save(folder, 10, 20)
    for step in (10, 20):
        (folder.path(step) / ".metadata").unlink()
    said: list[str] = []
    assert folder.newest_verified(said.append) is None
    assert [f"step-{step}" in line for step, line in zip((20, 10), said, strict=True)] == [True, True]


def test_a_damaged_checkpoint_is_replaced_by_one_of_the_same_step(folder: CheckpointFolder) -> None:
    save(folder, 10)
    (folder.path(10) / ".metadata").unlink()
    save(folder, 10)
    assert folder.problem(10) is None
    assert names(folder) == ["step-10"]


def test_an_unfinished_checkpoint_is_ignored_and_removed_before_the_next(folder: CheckpointFolder) -> None:
    save(folder, 10)
    (folder.begin(20) / "__0_0.distcp").write_text("half")  # and here the run was killed
    assert folder.steps() == [10]
    assert folder.newest_verified(pytest.fail) == 10
    assert list(folder.begin(15).iterdir()) == []
    assert names(folder) == ["step-10", "tmp-step-15"]
    folder.remove_unfinished()
    assert names(folder) == ["step-10"]


def test_retention_keeps_the_newest(folder: CheckpointFolder) -> None:
    save(folder, 1, 2, 10, 20)
    folder.retain(0, pytest.fail)
    assert folder.steps() == [20, 10, 2, 1]
    folder.retain(3, pytest.fail)
    assert folder.steps() == [20, 10, 2]
    folder.retain(1, pytest.fail)
    assert folder.steps() == [20]


@pytest.mark.parametrize("best", [1, 2, 3, 4])
def test_retention_never_deletes_the_best(folder: CheckpointFolder, best: int) -> None:
    save(folder, 1, 2, 3, 4)
    folder.set_best(best)
    folder.retain(2, pytest.fail)
    assert set(folder.steps()) == {3, 4, best}
    assert folder.best() == best
    assert folder.problem(best) is None


def test_retention_keeps_every_so_many_steps(folder: CheckpointFolder) -> None:
    save(folder, 5, 10, 15, 20, 25)
    folder.retain(1, pytest.fail, keep_every=10)
    assert folder.steps() == [25, 20, 10]
    assert names(folder) == ["step-10", "step-20", "step-25"]


def test_nothing_is_deleted_when_the_newest_does_not_read_back(folder: CheckpointFolder) -> None:
    save(folder, 5, 10, 15)
    change("shard-b.distcp", flip)(folder.path(15))
    said: list[str] = []
    folder.retain(1, said.append)
    assert folder.steps() == [15, 10, 5]
    assert "shard-b.distcp has changed" in said[0]


def test_a_deletion_that_was_cut_short_leaves_no_checkpoint(folder: CheckpointFolder, monkeypatch) -> None:
    save(folder, 5, 10)
    monkeypatch.setattr("shutil.rmtree", lambda path: None)
    folder.retain(1, pytest.fail)
    monkeypatch.undo()
    assert folder.steps() == [10]
    folder.remove_unfinished()
    assert names(folder) == ["step-10"]


def test_what_is_set_aside_is_never_deleted(folder: CheckpointFolder) -> None:
    for _ in range(3):
        save(folder, 5, 10)
        folder.set_aside_after(5, lambda line: None)
    save(folder, 10)
    folder.retain(1, pytest.fail)
    assert names(folder) == ["set-aside-step-10", "set-aside-step-10-2", "set-aside-step-10-3", "step-10"]


def test_what_is_set_aside_outlives_a_step_that_is_saved_twice(folder: CheckpointFolder) -> None:
    save(folder, 5)
    folder.set_aside_after(3, lambda line: None)
    save(folder, 5, 5)
    assert names(folder) == ["set-aside-step-5", "step-5"]


def test_the_best_is_a_line_with_its_name(folder: CheckpointFolder) -> None:
    save(folder, 5, 10)
    folder.set_best(5)
    folder.set_best(10)
    assert (folder.root / "best").read_text() == "step-10\n"
    assert names(folder) == ["best", "step-10", "step-5"]
    (folder.root / "best").write_text("")
    assert folder.best() is None
