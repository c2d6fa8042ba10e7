"""A lock for a folder that several processes use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan_style.common.files import first_missing, locked, nearest_existing

HOLD = """
import sys
from functools import partial
from pathlib import Path
from torchtitan_style.common.files import locked
say = partial(print, flush=True)
with locked(Path(sys.argv[1]), say):
    say("has it")
    sys.stdin.readline()
say("left it")
"""


def test_others_wait_and_a_killed_holder_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "shared")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first, subprocess.Popen(command, **pipes) as second:
        said = {process: process.stdout.readline() for process in (first, second)}
        [holder] = [process for process, line in said.items() if line == "has it\n"]
        [waiting] = [process for process in said if process is not holder]
        assert said[waiting] == f"waiting for another process that uses {tmp_path / 'shared'}\n"
        holder.kill()
        assert waiting.stdout.readline() == "has it\n"
        waiting.kill()
    with locked(tmp_path / "shared", pytest.fail):
        pass


def test_the_nearest_existing_folder_and_the_first_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "a" / "b" / "c"
    assert nearest_existing(deep) == tmp_path
    assert first_missing(deep) == tmp_path / "a"
    assert nearest_existing(tmp_path) == tmp_path
    assert first_missing(tmp_path) is None
    monkeypatch.chdir(tmp_path)
    assert nearest_existing(Path("a/b")).resolve() == tmp_path
    assert first_missing(Path("a/b")) == Path("a")
