"""Ranks that fail: one message, the right status, and no restart where it would only repeat the error."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, ROOT, Python
from torchtitan_style.common import memory
from torchtitan_style.launch.agent import describe_end

LAUNCHER = """
import sys
from torchtitan_style.launch.torchrun import start_ranks
start_ranks("failing_rank", [], nproc=int(sys.argv[1]), on_gpus=False, max_restarts=int(sys.argv[2]))
"""

RANK = """
import os, signal, sys, time
from torchtitan_style.common.reporting import check_verdict, reported_errors
from torchtitan_style.common.errors import RunError, UserError
from torchtitan_style.train.stopping import ending_at_once, interruptible

rank = int(os.environ["RANK"])
with ending_at_once(), reported_errors():
    check_verdict()
    with interruptible(gracefully=True):
        import torch, torch.distributed as dist
        with open(sys.path[0] + "/attempts", "a") as file:
            file.write(f"{{rank}}\\n")
        dist.init_process_group("gloo")
        dist.barrier()
        if rank in {ranks}:
            with open(sys.path[0] + "/failed", "w") as file:
                file.write(str(time.time()))
            {fail}
        for _ in range(2):  # the others find out in a collective
            dist.all_reduce(torch.zeros(1))
"""


class Failing:
    """Starts ranks of which some fail, as the launcher does."""

    def __init__(self, python: Python, folder: Path) -> None:
        self.python, self.folder = python, folder

    def __call__(self, ranks: tuple[int, ...], fail: str, *, nproc: int = 2, restarts: int = 3):
        (self.folder / "failing_rank.py").write_text(RANK.format(ranks=ranks, fail=fail), encoding="utf-8")
        (self.folder / "launcher.py").write_text(LAUNCHER, encoding="utf-8")
        environment = ENVIRONMENT | {"PYTHONPATH": f"{self.folder}:{ROOT}"}
        return self.python(
            self.folder / "launcher.py", nproc, restarts, environment=environment, cwd=self.folder, timeout=60
        )

    def attempts(self) -> int:
        """How often rank 0 was started."""
        return (self.folder / "attempts").read_text(encoding="utf-8").split().count("0")

    def seconds_since_failure(self) -> float:
        return time.time() - float((self.folder / "failed").read_text(encoding="utf-8"))


@pytest.fixture
def failing(python: Python, tmp_path: Path) -> Failing:
    return Failing(python, tmp_path)


@pytest.mark.parametrize(
    ("kind", "status", "ranks", "nproc"),
    [
        ("UserError", 2, (0,), 2),
        ("UserError", 2, (1,), 2),
        ("UserError", 2, (0, 1, 2, 3), 4),
        ("RunError", 1, (1,), 2),
    ],
)
def test_an_expected_error_is_one_line_and_no_restart(
    failing: Failing, kind: str, status: int, ranks: tuple[int, ...], nproc: int
) -> None:
    done = failing(ranks, f"raise {kind}('the model has no layers')", nproc=nproc)
    assert done.stderr == "error: the model has no layers\n"
    assert done.returncode == status
    assert failing.attempts() == 1
    assert failing.seconds_since_failure() < 8  # 1 to 2 on an idle machine; four attempts took 44


def test_a_full_disk_is_one_line_and_no_restart(failing: Failing) -> None:
    done = failing((0, 1), "raise OSError(28, 'No space left on device', 'outputs')")
    assert (done.stderr, done.returncode) == ("error: [Errno 28] No space left on device: 'outputs'\n", 1)
    assert failing.attempts() == 1


def test_an_exception_is_one_traceback_an_attempt(failing: Failing) -> None:
    done = failing((0, 1), "raise ZeroDivisionError('of both ranks')", restarts=1)
    assert done.returncode == 1
    assert failing.attempts() == 2
    assert done.stderr.count("Traceback") == done.stderr.count("ZeroDivisionError: of both ranks") == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("rank", "error"))]
    failed, restarting, again, error = lines
    assert failed.endswith("failed:")
    assert restarting.endswith("exited with status 1; restarting all ranks (1 of 1)")
    assert again.endswith("failed:")
    assert error.startswith("error: rank ")
    assert error.endswith(" exited with status 1")
    assert "torch.distributed.elastic" not in done.stderr


def test_a_killed_rank_is_named_with_its_signal(failing: Failing) -> None:
    done = failing((1,), "os.kill(os.getpid(), signal.SIGKILL)", restarts=1)
    assert done.returncode == 1
    assert failing.attempts() == 2
    lines = done.stderr.splitlines()
    assert lines[0].startswith("rank 1 was killed by SIGKILL"), done.stderr
    assert lines[0].endswith("; restarting all ranks (1 of 1)")
    assert lines[-1].startswith("error: rank 1 was killed by SIGKILL")
    assert len(lines) == 2, done.stderr


def test_how_a_rank_ended_in_words() -> None:
    assert describe_end(3, 1, memory_ran_out=True) == "rank 3 exited with status 1"
    assert describe_end(0, -signal.SIGSEGV, memory_ran_out=True) == "rank 0 was killed by SIGSEGV"
    assert describe_end(0, -signal.SIGKILL, memory_ran_out=False) == "rank 0 was killed by SIGKILL"
    assert "ran out of memory" in describe_end(0, -signal.SIGKILL, memory_ran_out=True)
    assert describe_end(0, -(signal.SIGRTMIN + 1), memory_ran_out=False).startswith("rank 0 was killed by signal ")


def test_the_kernel_is_asked_whether_memory_ran_out() -> None:
    listed = dict(line.split() for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines())
    assert memory.oom_kills() == int(listed.get("oom_kill", 0))
