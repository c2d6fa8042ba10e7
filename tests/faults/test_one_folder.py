"""Two runs and one folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.runs import Runs
from torchtitan_style.common.errors import UserError
from torchtitan_style.common.reporting import VERDICT, report_stopped
from torchtitan_style.data.prepare.prepared import Prepared
from torchtitan_style.launch import launcher as launch
from torchtitan_style.launch.run_lock import check_free, run_lock

HOST = socket.gethostname()


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_second_run_is_refused_and_names_the_first(runs: Runs, tmp_path: Path, nproc: int) -> None:
    mark = tmp_path / "mark"
    fault = {"kind": "hold_step", "step": 2, "mark": str(mark)}
    first = runs.start("run", "--training.steps", 4, nproc=nproc, faults=[fault])
    first.until(Path(f"{mark}.0").exists, "step 2")
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()}
    second = runs(first.folder, nproc=3 - nproc, status=2)
    holder = f"process {first.ranks()[0]} on {HOST}"
    assert f"error: job.dump_folder: {first.folder} is in use by another run, {holder}" in second.output
    assert len(second.output.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()} == before
    Path(f"{mark}.go").touch()
    assert first.wait() == 0, first.output
    assert not (first.folder / "run.lock").exists()


def gone() -> int:
    """The pid of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


def write_lock(folder: Path, host: str, pid: int, *, age: float = 0) -> Path:
    folder.mkdir(exist_ok=True)
    lock = folder / "run.lock"
    lock.write_text(json.dumps({"host": host, "pid": pid, "since": 0}))
    os.utime(lock, (time.time() - age, time.time() - age))
    return lock


def test_a_lock_that_a_killed_run_left_is_taken_over(runs: Runs, tmp_path: Path) -> None:
    folder = runs.folder("run")
    write_lock(folder, HOST, gone())
    runs(folder, "--training.steps", 1)
    assert not (folder / "run.lock").exists()


def test_a_lock_of_another_host_counts_while_it_is_fresh(tmp_path: Path) -> None:
    lock = write_lock(tmp_path, "elsewhere", 7, age=50)
    content = lock.read_text()
    for enter in (lambda: run_lock(tmp_path).__enter__(), lambda: check_free(tmp_path)):
        with pytest.raises(UserError, match=r"process 7 on elsewhere, whose last heartbeat was 50 s ago; if it is "
                                            r"gone, wait (70|69) s"):  # fmt: skip
            enter()
        assert lock.read_text() == content
    write_lock(tmp_path, "elsewhere", 7, age=130)
    check_free(tmp_path)
    assert json.loads(lock.read_text())["host"] == "elsewhere"
    with run_lock(tmp_path):
        assert json.loads(lock.read_text()) | {"since": 0} == {"host": HOST, "pid": os.getpid(), "since": 0}
        with pytest.raises(UserError, match=f"process {os.getpid()} on {HOST}"):
            check_free(tmp_path)
    assert not lock.exists()


def test_a_run_on_several_hosts_takes_over_the_lock_of_its_lost_host(tmp_path: Path) -> None:
    with run_lock(tmp_path, run="node0:29500"):
        mine = json.loads((tmp_path / "run.lock").read_text())
    lock = write_lock(tmp_path, "elsewhere", 7, age=1)
    lock.write_text(json.dumps(mine | {"host": "elsewhere"}))
    with pytest.raises(UserError, match="last heartbeat"), run_lock(tmp_path, run="node7:29500"):
        pass
    with run_lock(tmp_path, run="node0:29500"):
        assert json.loads(lock.read_text())["host"] == HOST


def test_a_lock_is_kept_fresh(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("torchtitan_style.common.locks._STALE", 0.3)
    with run_lock(tmp_path):
        lock = tmp_path / "run.lock"
        os.utime(lock, (0, 0))
        deadline = time.monotonic() + 20
        while lock.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_lock_leaves_no_empty_folder_behind(tmp_path: Path) -> None:
    with run_lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / "run.lock").exists()
    assert not (tmp_path / "a").exists()
    check_free(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_lock_file_with_nonsense_is_taken_over(tmp_path: Path) -> None:
    for content in ("", "[]", "not JSON", '{"pid":'):
        (tmp_path / "run.lock").write_text(content)
        with run_lock(tmp_path):
            pass


def test_the_launcher_holds_the_folder_while_it_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def get(*_: object, **__: object) -> Prepared:
        with pytest.raises(UserError, match=f"in use by another run, process {os.getpid()} on"):
            check_free(tmp_path / "run")
        seen.append("prepared")
        return Prepared(tmp_path, {})

    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setattr("torchtitan_style.data.prepare.store.CorpusStore.get", get)
    monkeypatch.setattr("torchtitan_style.launch.launcher.start_ranks", lambda *_, **__: seen.append("started"))
    launch.main(["--job.dump_folder", str(tmp_path / "run")])
    assert seen == ["prepared", "started"]
    check_free(tmp_path / "run")  # the ranks take it


def test_that_the_ranks_here_have_saved_counts_before_preempted_json_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank may have written it on another host, and NFS may show it a minute late."""
    seen = []

    def start(*_: object, has_saved: Callable[[], bool], **__: object) -> None:
        seen.append(has_saved())
        report_stopped()
        seen.append(has_saved())

    for name, value in {"NNODES": "2", "NODE_RANK": "1", "RDZV_ENDPOINT": "node0:29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(VERDICT, str(tmp_path / "verdict"))
    monkeypatch.setattr("torchtitan_style.launch.launcher.wait_for_host", lambda _: None)
    monkeypatch.setattr("torchtitan_style.launch.launcher.start_ranks", start)
    launch.main(["--job.dump_folder", str(tmp_path / "run"), "--training.local_batch_size", "4"])
    assert seen == [False, True]


def test_another_host_may_come_while_the_first_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name, value in {"NNODES": "2", "NODE_RANK": "1", "RDZV_ENDPOINT": "node0:29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torchtitan_style.launch.launcher.wait_for_host", lambda _: seen.append("waited"))
    monkeypatch.setattr("torchtitan_style.launch.launcher.start_ranks", lambda *_, **__: seen.append("started"))
    with run_lock(tmp_path / "run"):
        launch.main(["--job.dump_folder", str(tmp_path / "run"), "--training.local_batch_size", "4"])
    assert seen == ["waited", "started"]
