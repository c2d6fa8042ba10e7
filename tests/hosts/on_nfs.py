"""Locks and a run on hosts that share their folder by NFS only: run in guest.sh by test_nfs.py."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.cluster import Cluster, Host, _child, cluster_of
from tests.hosts.test_hosts import Run, end_and_compare

# What a host has seen of files and names counts for ten minutes, if it has no reason to look again; a minute is usual.
# soft: when a host without power goes, so does its mount.
OPTIONS = "actimeo=600,soft,timeo=50,retrans=2"
SHARED = f"vers=4.2,{OPTIONS}"
UNSHARED = f"vers=3,nolock,port=2049,mountport=20048,mountproto=tcp,{OPTIONS}"
"""Locks count within one host."""

HOLD = """
import signal, sys
from pathlib import Path
from torchtitan_style.common import locks
from torchtitan_style.common.reporting import reported_errors
from torchtitan_style.launch.run_lock import run_lock

signal.signal(signal.SIGTERM, lambda *_: sys.exit())
locks._STALE = float(sys.argv[2])
with reported_errors(), run_lock(Path("run"), run=sys.argv[1]):
    print("has it", flush=True)
    signal.pause()
"""
COUNT = """
import os, time
from pathlib import Path
from torchtitan_style.common.locks import locked

for _ in range(30):
    with locked(Path("prepared"), print):
        os.close(os.open("inside", os.O_CREAT | os.O_EXCL))  # fails if another one is inside
        count = int(Path("count").read_text()) if Path("count").exists() else 0
        time.sleep(0.02)
        Path("count").write_text(str(count + 1))
        os.unlink("inside")
"""

LOOK = """
import os, sys, time
from pathlib import Path
from torchtitan_style.common.files import refresh_names

def step(number):
    print("step", number, flush=True)
    while not os.path.exists(f"{sys.argv[1]}{number}"):
        time.sleep(0.1)

def seen():
    return Path("folder/file").read_text() if Path("folder/file").exists() else "missing"

def both():
    before = seen()
    refresh_names(Path("folder"))
    print(before, "->", seen(), flush=True)

seen()
step(1)
both()
step(2)
both()
"""


@pytest.fixture(params=[SHARED])
def two(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with cluster_of(2, tmp_path, nfs=request.param) as cluster:
        yield cluster


class Locks(Run):
    """Holders of the lock of the cluster's run folder."""

    def hold(self, host: Host, *, run: str = "", stale: float = 120) -> subprocess.Popen[str]:
        return host.start("-c", HOLD, run, str(stale), log=f"{host.name}.log")

    def refused(self, host: Host, *, run: str = "", stale: float = 120) -> str:
        """What a further holder on ``host`` says as it ends, or "" if it has the lock."""
        log = self.cluster.folder / f"{host.name}.log"
        before = log.stat().st_size if log.exists() else 0
        process = self.hold(host, run=run, stale=stale)
        self.wait(lambda: process.poll() is not None or self.output(host)[before:] != "", "an answer")
        said = self.output(host)[before:]
        assert said == "has it\n" or process.wait(600) == 2, said
        return "" if said == "has it\n" else self.output(host)[before:]


@pytest.mark.parametrize("two", [SHARED, UNSHARED], indirect=True)
def test_a_lock_is_seen_by_the_other_host_and_taken_over(two: Cluster) -> None:
    first, second = two.hosts
    locks = Locks(two, nnodes="2")
    holder = locks.hold(first)
    locks.wait_for_output(first, "has it")
    said = locks.refused(second)
    assert "run is in use by another run, process " in said
    assert " on h0" in said
    assert ("heartbeat" in said) == (two.nfs == UNSHARED)
    os.kill(_child(holder), signal.SIGKILL)
    locks.wait(lambda: not locks.refused(second, stale=120 if two.nfs == SHARED else 20), "the lock")


def test_the_lock_of_a_host_without_power_is_taken_over_by_its_run(two: Cluster) -> None:
    first, second = two.hosts
    locks = Locks(two, nnodes="2")
    locks.hold(first, run="h0:29500")
    locks.wait_for_output(first, "has it")
    first.kill()
    assert "on h0" in locks.refused(second, run="elsewhere:1")
    locks.hold(second, run="h0:29500")
    locks.wait_for_output(second, "has it")
    first.boot()
    assert "on h1" in locks.refused(first, run="elsewhere:1")


def test_a_lock_is_handed_over(two: Cluster) -> None:
    """As between the first ranks of two attempts: the second waits for it, and the file of the first goes."""
    first, second = two.hosts
    locks = Locks(two, nnodes="2")
    holder = locks.hold(first, run="h0:29500")
    locks.wait_for_output(first, "has it")
    locks.hold(second, run="h0:29500")
    first.stop(holder)
    locks.wait_for_output(second, "has it")
    assert "on h1" in locks.refused(first, run="elsewhere:1")


def test_one_host_at_a_time_prepares_a_folder(two: Cluster) -> None:
    counting = [host.start("-c", COUNT, log=f"{host.name}.log") for host in two.hosts]
    assert [process.wait(900) for process in counting] == [0, 0]
    assert (two.folder / "count").read_text() == "60"
    assert not (two.folder / "prepared.lock").exists()


def test_names_that_another_host_has_made_are_seen(two: Cluster) -> None:
    """A host that has looked for a file, and one that has read it in a folder that was replaced."""
    first, second = two.hosts
    run = Run(two, nnodes="2")
    go = f"/dev/shm/{two.folder.name}-"  # of this machine, and so of both

    def on_first(script: str) -> None:
        first.run("sh", "-ec", f"cd {two.folder}; {script}")

    looks = second.start("-c", LOOK, go, log="h1.log")
    run.wait_for_output(second, "step 1")
    on_first(f"mkdir folder; echo -n new > folder/file; touch {go}1")
    run.wait_for_output(second, "step 2")
    on_first(f"mv folder old; mkdir folder; echo -n newer > folder/file; touch {go}2")
    assert looks.wait(600) == 0
    assert "missing -> new\nstep 2\nnew -> newer\n" in run.output(second)


def test_a_run_stops_and_resumes(two: Cluster) -> None:
    run = Run(two, nnodes="2", options=("--comm.host_timeout_seconds", "60", "--comm.train_timeout_seconds", "120"))
    started = run.begin(2)
    for host, process in zip(two.hosts, started, strict=True):
        host.stop(process)
    assert [process.wait(900) for process in started] == [0, 0]
    for host in two.hosts:
        run.start(host)
    run.wait_for_output(two.hosts[0], "resuming after step")
    run.wait_for_steps(12)
    end_and_compare(run)
