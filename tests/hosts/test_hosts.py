"""Runs on several hosts, each a set of namespaces on this machine: hosts that are lost, come back and come late."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.hosts.cluster import Cluster, Host, cluster_of, why_no_hosts

pytestmark = pytest.mark.skipif(bool(why_no_hosts()), reason=f"no namespaces here: {why_no_hosts()}")

RUN = [
    "-m", "torchtitan_style.launch", "--config", ROOT / "train_configs/qwen3.toml", "--model.flavor", "debug",
    "--training.steps", "100000",
    "--optimizer.name", "adamw", "--optimizer.lr", "0.0001",  # a larger one makes differences of rounding grow
    "--data.dataset", "files", "--data.paths", "corpus.txt", "--data.validation_fraction", "0",
    "--training.seq_len", "32", "--training.global_batch_size", "12", "--training.mixed_precision_param", "float32",
    "--validation.enable", "false", "--generation.enable", "false", "--metrics.log_freq", "1",
    "--checkpoint.interval", "10", "--checkpoint.keep_latest_k", "2", "--job.dump_folder", "run",
    "--comm.host_timeout_seconds", "6", "--comm.rejoin_timeout_seconds", "2", "--comm.train_timeout_seconds", "20",
]  # fmt: skip


SLOW_STEPS = """
import time
from torchtitan_style.train.observer import Observer, observe

class Slow(Observer):
    def after_backward(self, step, model, loss):
        time.sleep(0.05)

observe(Slow())
"""


class Run:
    """A training run of ``cluster``'s hosts, one process each."""

    def __init__(self, cluster: Cluster, *, nnodes: str, options: tuple[str, ...] = ()) -> None:
        self.cluster, self.nnodes = cluster, nnodes
        self.arguments = [*RUN, *options]
        self.folder = cluster.folder / "run"
        random = Random(0)
        words = (f"{random.choice('abcdefgh')}{random.randrange(300)}" for _ in range(20000))
        if not (corpus := cluster.folder / "corpus.txt").exists():
            corpus.write_text(" ".join(words), encoding="utf-8")

    def start(self, host: Host, **environment: str) -> subprocess.Popen[str]:
        return host.start(
            *self.arguments, log=f"{host.name}.log",
            NNODES=self.nnodes, NPROC="1", NODE_RANK=str(host.number), RDZV_ENDPOINT="h0:29500", **environment,
        )  # fmt: skip

    def begin(self, count: int) -> list[subprocess.Popen[str]]:
        """Start the first ``count`` hosts, and wait until all of them train."""
        started = [self.start(host) for host in self.cluster.hosts[:count]]
        self.wait_for_output(self.cluster.hosts[0], f"on {count} × CPU")
        self.wait_for_steps(12)
        return started

    def output(self, host: Host) -> str:
        return (self.cluster.folder / f"{host.name}.log").read_text(encoding="utf-8")

    def lines(self) -> list[dict[str, Any]]:
        try:
            text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def step(self) -> int:
        """The step that was last written; only the end of the file is read, which may have grown for hours."""
        with contextlib.suppress(FileNotFoundError), open(self.folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            if len(parts := file.read().split(b"\n")) > 1 and parts[-2].startswith(b"{"):
                return int(json.loads(parts[-2])["step"])
        return 0

    def wait_for_steps(self, more: int, *, seconds: float = 600) -> None:
        """Until the run has taken ``more`` steps from now on."""
        goal = self.step() + more
        self.wait(lambda: self.step() >= goal, f"step {goal}", seconds)

    def wait_for_output(self, host: Host, text: str, *, times: int = 1) -> None:
        self.wait(lambda: self.output(host).count(text) >= times, f'"{text}" from {host.name}')

    @contextlib.contextmanager
    def expecting(self, *texts: str, host: int = 0) -> Iterator[None]:
        """Wait, after what is done inside, until the host has printed each of ``texts`` once more; then for steps."""
        printer = self.cluster.hosts[host]
        before = {text: self.output(printer).count(text) for text in texts}
        yield
        for text, count in before.items():
            self.wait_for_output(printer, text, times=count + 1)
        self.wait_for_steps(5)

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 600) -> None:
        waited, last = 0.0, time.monotonic()
        while not condition():
            now = time.monotonic()
            waited += min(now - last, 1.0)  # not while this process is stopped itself
            last = now
            if waited > seconds:
                logs = sorted(self.cluster.folder.glob("h*.log"))
                ends = "\n".join(f"{log.stem}: {log.read_text(encoding='utf-8')[-3000:]}" for log in logs)
                raise AssertionError(f"{what} did not come within {seconds} s\n{ends}")
            time.sleep(0.1)

    def curve(self) -> dict[int, tuple[str, float]]:
        """Batch hash and loss of each step, as last written."""
        return {line["step"]: (line["batch_hash"], line["loss"]) for line in self.lines()}


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Cluster]:
    with cluster_of(3, tmp_path) as cluster:
        yield cluster


def end(run: Run, *, seconds: float = 600) -> tuple[dict[int, tuple[str, float]], dict[int, tuple[str, float]]]:
    """Stop the run. Its curve, and that of as many steps on one host that nothing happens to, within ``seconds``."""
    for host in run.cluster.hosts:
        host.stop_all(seconds)
    found = run.curve()
    alone = Run(run.cluster, nnodes="1")
    alone.arguments = [*run.arguments, "--job.dump_folder", "alone", "--parallelism.tensor_parallel_degree", "1"]
    alone.arguments += ["--job.custom_import", "[]"]
    alone.folder = run.cluster.folder / "alone"
    alone.start(run.cluster.hosts[0])
    alone.wait(lambda: alone.step() >= max(found), f"step {max(found)} on one host", seconds)
    run.cluster.hosts[0].stop_all(seconds)
    return found, alone.curve()


def end_and_compare(run: Run) -> None:
    """Stop the run, and compare its steps with those of the same run on one host that nothing happens to."""
    found, expected = end(run)
    assert sorted(found) == list(range(1, len(found) + 1))
    for step, (batch, loss) in found.items():
        assert batch == expected[step][0], step
        assert loss == pytest.approx(expected[step][1], rel=1e-5), step


def test_a_run_shrinks_and_grows_with_its_hosts(three: Cluster) -> None:
    """Two hosts, one without power, and another one joins: the curve is that of one host."""
    _, second, third = three.hosts
    (three.folder / "slow_steps.py").write_text(SLOW_STEPS)  # else thousands, while the test waits
    slow = ("--job.custom_import", "slow_steps")
    run = Run(three, nnodes="1:3", options=("--comm.host_timeout_seconds", "3", *slow))
    run.begin(2)
    with run.expecting(
        "no heartbeat for 3 s from 1 of 2 hosts (left: h0)", "training continues with 1 host (2 before)"
    ):
        second.kill()
    with run.expecting("training continues with 2 hosts (1 before)"):
        run.start(third)
    end_and_compare(run)


@pytest.mark.nightly
def test_a_host_that_is_told_to_stop_leaves(three: Cluster) -> None:
    _, _, third = three.hosts
    run = Run(three, nnodes="1:3")
    leaves = run.begin(3)[2]
    with run.expecting("training continues with 2 hosts (3 before)"):
        third.stop(leaves)
        assert leaves.wait(600) == 0
    end_and_compare(run)


@pytest.mark.nightly
def test_a_host_of_a_fixed_number_is_replaced(three: Cluster) -> None:
    _, second, _ = three.hosts
    run = Run(three, nnodes="2")
    run.begin(2)
    with run.expecting("dp 2"):
        second.kill()
        second.boot()
        run.start(second)
    end_and_compare(run)


@pytest.mark.nightly
def test_the_first_host_is_replaced(three: Cluster) -> None:
    """The others meet at its address, so they wait until it is back."""
    first, second, third = three.hosts
    run = Run(three, nnodes="1:3")
    run.begin(3)
    first.kill()
    for host in (second, third):
        run.wait_for_output(host, "the host at h0:29500 is lost; starting again once it is back")
    first.boot()
    with run.expecting("dp 3"):
        run.start(first)
    end_and_compare(run)


@pytest.mark.nightly
def test_without_the_first_host_a_fixed_number_ends(three: Cluster) -> None:
    first, second, _ = three.hosts
    run = Run(three, nnodes="2")
    ends = run.begin(2)[1]
    first.kill()
    assert ends.wait(600) == 1
    assert "error: the first host, h0:29500, has not answered for 6 s" in run.output(second)
    first.boot()
    run.start(first)
    run.start(second)
    run.wait_for_steps(12)
    end_and_compare(run)


@pytest.mark.nightly
def test_a_network_that_is_gone_for_seconds_is_waited_for(three: Cluster) -> None:
    first, second, _ = three.hosts
    run = Run(three, nnodes="1:2", options=("--comm.host_timeout_seconds", "30"))
    run.begin(2)
    second.cut()
    time.sleep(5)
    second.reconnect()
    run.wait_for_steps(12)
    assert "restarting" not in run.output(first)
    end_and_compare(run)


@pytest.mark.nightly
@pytest.mark.parametrize("link", ["lossy", "slow"])
def test_a_bad_link_only_costs_time(three: Cluster, link: str) -> None:
    first, second, _ = three.hosts
    run = Run(three, nnodes="1:2", options=("--comm.host_timeout_seconds", "30"))
    run.begin(2)
    if link == "lossy":
        second.lose_packets(0.1)
    else:
        second.slow_down("20mbit")
    run.wait_for_steps(30)
    assert "restarting" not in run.output(first)
    end_and_compare(run)


@pytest.mark.nightly
def test_a_host_whose_own_disk_is_full_trains(three: Cluster) -> None:
    """Nothing that matters is kept in a host's folder for temporary files."""
    first, second, _ = three.hosts
    second.fill_disk(three.folder / "full")
    run = Run(three, nnodes="1:2")
    run.start(first)
    run.start(second, TMPDIR=str(three.folder / "full"))
    run.wait_for_output(first, "on 2 × CPU")
    run.wait_for_steps(12)
    end_and_compare(run)


@pytest.mark.nightly
def test_a_host_without_network_comes_back(three: Cluster) -> None:
    _, second, _ = three.hosts
    run = Run(three, nnodes="1:2")
    run.begin(2)
    with run.expecting("training continues with 1 host (2 before)"):
        second.cut()
    with run.expecting("training continues with 2 hosts (1 before)"):
        second.reconnect()
    end_and_compare(run)


@pytest.mark.nightly
def test_numbers_that_cannot_train_wait(three: Cluster) -> None:
    """Two ranks share each matrix, so three hosts wait for a fourth or the loss of one."""
    first, _, third = three.hosts
    run = Run(three, nnodes="1:3", options=("--parallelism.tensor_parallel_degree", "2"))
    run.begin(2)
    run.start(third)
    run.wait_for_output(first, "3 hosts cannot train, and wait for a change in their number: data_parallel")
    with run.expecting("resuming after step"):
        third.kill()
    end_and_compare(run)


# Python's own time; the file system's clock stays right.
CLOCK = """
import time
true = time.time
time.time = lambda: true() + {seconds}
"""


@pytest.mark.nightly
@pytest.mark.parametrize("hours", [1, -1])
def test_clocks_an_hour_apart(three: Cluster, hours: int) -> None:
    first, second, _ = three.hosts
    (three.folder / "clock").mkdir()
    (three.folder / "clock/sitecustomize.py").write_text(CLOCK.format(seconds=3600 * hours), encoding="utf-8")
    run = Run(three, nnodes="1:2")
    run.start(first)
    run.start(second, PYTHONPATH=f"{three.folder / 'clock'}:{ROOT}")
    run.wait_for_output(first, "on 2 × CPU")
    steps = run.step()
    time.sleep(15)  # twice as long as a host may give no heartbeat
    assert run.step() > steps
    assert f"this host's clock is 3600 s {'ahead of' if hours > 0 else 'behind'}" in run.output(second)
    assert "restarting" not in run.output(first)
    end_and_compare(run)
