"""Locks: one process at a time, of all hosts. Between hosts that share a folder by NFS: tests/hosts/on_nfs.py."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT
from torchtitan_style.common.locks import locked

HOLD = """
import sys
from functools import partial
from pathlib import Path
from torchtitan_style.common.locks import locked
say = partial(print, flush=True)
with locked(Path(sys.argv[1]), say):
    say("has it")
    sys.stdin.readline()
say("left it")
"""


def test_others_wait_and_a_killed_holder_is_no_obstacle(tmp_path: Path) -> None:
    """Processes of two hosts have different folders for temporary files."""
    shared = tmp_path / "new" / "shared"
    command = [sys.executable, "-c", HOLD, str(shared)]
    with ExitStack() as stack:
        said = {}
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            environment = ENVIRONMENT | {"TMPDIR": str(tmp_path / name)}
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            said[stack.enter_context(process)] = process.stdout.readline()
        [holder] = [process for process, line in said.items() if line == "has it\n"]
        [waiting] = [process for process in said if process is not holder]
        assert said[waiting] == f"waiting for process {holder.pid} on {socket.gethostname()}, which uses {shared}\n"
        holder.kill()
        assert waiting.stdout.readline() == "has it\n"
        waiting.communicate("\n")
    with locked(shared, pytest.fail):
        pass
    assert not list(shared.parent.iterdir())


def test_a_lock_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "new" / "shared", pytest.fail):
        raise KeyError
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_locked_is_read_without_a_lock(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with locked(tmp_path / "file" / "shared", pytest.fail):
        pass
