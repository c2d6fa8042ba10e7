"""The ``checkpoint/`` folder of a run: which checkpoints there are, whole ones only.

    checkpoint/step-500/           shards written by torch.distributed.checkpoint
    checkpoint/step-500/train_state.json
    checkpoint/step-500/config.toml      the run's settings, all dimensions of the model included
    checkpoint/step-500/tokenizer/
    checkpoint/step-500/manifest.json    size and SHA-256 of every other file, written last
    checkpoint/best                a line with the name of the best one, as "step-500"

A checkpoint is written under a temporary name and renamed when it is complete and on disk, so one
with its final name was whole once; the manifest tells whether it still is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtitan_style.folders import fsync

__all__ = ["MANIFEST", "CheckpointFolder", "problem_of", "seal"]

MANIFEST = "manifest.json"


class CheckpointFolder:
    """Names, verification and retention. Knows nothing of tensors; used by one process at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: int) -> Path:
        return self.root / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps with a checkpoint, newest first; verified or not."""
        names = [p.name.removeprefix("step-") for p in self.root.glob("step-*") if p.is_dir()]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def newest_verified(self, say: Callable[[str], None]) -> int | None:
        """The newest step whose files are as they were written; says which ones are not, and why."""
        for step in self.steps():
            problem = self.problem(step)
            if problem is None:
                return step
            say(f"skipping the checkpoint {self.path(step)}: {problem}")
        return None

    def problem(self, step: int) -> str | None:
        """What is wrong with the files of ``step``, or None."""
        return problem_of(self.path(step))

    def begin(self, step: int) -> Path:
        """An empty temporary folder to write the checkpoint of ``step`` into."""
        self.remove_unfinished()
        temporary = self.root / f"tmp-step-{step}"
        temporary.mkdir(parents=True)
        return temporary

    def commit(self, step: int, train_state: dict[str, Any]) -> None:
        """Complete the temporary folder of ``step`` and give it its final name."""
        temporary = self.root / f"tmp-step-{step}"
        (temporary / "train_state.json").write_text(json.dumps(train_state, indent=2) + "\n", encoding="utf-8")
        seal(temporary, self.path(step), step=step)

    def train_state(self, step: int) -> dict[str, Any]:
        return json.loads((self.path(step) / "train_state.json").read_text(encoding="utf-8"))

    def set_best(self, step: int) -> None:
        """Name ``step`` as the best, in one go."""
        temporary = self.root / "best.tmp"
        temporary.write_text(f"{self.path(step).name}\n", encoding="utf-8")
        fsync(temporary)
        temporary.rename(self.root / "best")

    def best(self) -> int | None:
        try:
            return int((self.root / "best").read_text(encoding="utf-8").strip().removeprefix("step-"))
        except (OSError, ValueError):
            return None

    def retain(self, keep_latest_k: int) -> None:
        """Delete all but the newest ``keep_latest_k`` (0: none are deleted) and the best."""
        if keep_latest_k:
            for step in self.steps()[keep_latest_k:]:
                if step != self.best():
                    shutil.rmtree(self.path(step))

    def set_aside_after(self, step: int, say: Callable[[str], None]) -> None:
        """Rename the checkpoints of steps past ``step``, which the run goes on from: they are damaged, or of
        a course that it leaves, and would be resumed from next time."""
        for later in self.steps():
            if later > step:
                aside = self.root / f"set-aside-{self.path(later).name}"
                shutil.rmtree(aside, ignore_errors=True)
                self.path(later).rename(aside)
                say(f"the checkpoint of step {later} is now {aside}")
        if (self.best() or 0) > step:
            (self.root / "best").unlink()

    def remove_unfinished(self) -> None:
        """Delete what a killed run left half written."""
        for path in self.root.glob("tmp-step-*"):
            shutil.rmtree(path, ignore_errors=True)


def problem_of(folder: Path) -> str | None:
    """What is wrong with the files of one checkpoint, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        if not files:
            return f"{MANIFEST} lists no files"
        for name, expected in files.items():
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes instead of {expected['size']}"
            if _sha256(folder / name) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def seal(temporary: Path, final: Path, *, step: int) -> None:
    """Make a checkpoint of the files in ``temporary``: manifest, to disk, final name, in this order."""
    paths = sorted(temporary.rglob("*"))
    files = {
        path.relative_to(temporary).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in paths
        if path.is_file()
    }
    manifest = json.dumps({"step": step, "files": files}, indent=2) + "\n"
    (temporary / MANIFEST).write_text(manifest, encoding="utf-8")
    for path in (*paths, temporary / MANIFEST, temporary):
        fsync(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    fsync(final.parent)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
