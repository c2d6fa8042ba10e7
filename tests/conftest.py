"""What all tests share: how to start ranks and commands as real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from forked import Fork

ROOT = Path(__file__).parents[1]

# Two tests run at once on two cores: one thread each.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


# Files that take longest, longest first: the last worker to finish has short ones left.
LONGEST = (
    "distributed/test_gradients.py",
    "distributed/test_expert_gradients.py",
    "hosts/test_hosts.py",  # mostly waits
    "test_runs.py",
    "distributed/test_context_gradients.py",
    "models/test_causal_attention.py",
    "distributed/test_adapter_gradients.py",
    "faults/test_kills.py",
    "faults/test_pipeline_runs.py",
    "verification/test_command.py",
    "data/test_order.py",
    "test_extending.py",
    "test_start_from_weights.py",
    "faults/test_hangs.py",
    "faults/test_stop_signals.py",
    "distributed/test_pipeline.py",
    "faults/test_stops_while_starting.py",
    "faults/test_skipped_steps.py",
    "checkpoint/test_hf_import_export.py",
    "commands/test_text_commands.py",
    "test_expert_runs.py",
)


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = item.path.relative_to(ROOT / "tests").as_posix()
        return LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=place)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.markexpr == "not nightly":
        terminalreporter.write_line("not run: tests marked nightly; -m nightly runs them")


Python = Callable[..., subprocess.CompletedProcess[str]]


class Forks:
    """Processes as ``subprocess`` would start them, without the seconds that importing torch takes: see forked.py."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "socket"
        # What torchrun starts as a rank, in place of sys.executable.
        self.executable = folder / "python"
        script = Path(__file__).with_name("forked.py")
        self.executable.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {script} {self._socket} "$@"\n')
        self.executable.chmod(0o755)
        command = [sys.executable, str(script), str(self._socket)]
        self._process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE)

    def start(self, arguments: list[str], environment: dict[str, str], cwd: Path | None, fds: list[int]) -> Fork:
        while not self._socket.exists():  # it is importing
            assert self._process.poll() is None
            time.sleep(0.05)
        return Fork(str(self._socket), arguments, environment, str(cwd or Path.cwd()), fds)

    def run(
        self, *arguments: object, environment: dict[str, str], cwd: Path | None, input: str, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        with ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(3)]
            files[0].write(input)
            files[0].seek(0)
            line = list(map(str, arguments))
            fork = stack.enter_context(closing(self.start(line, environment, cwd, [file.fileno() for file in files])))
            status = fork.wait(timeout)
            for file in files:
                file.seek(0)
            return subprocess.CompletedProcess(line, status, *(file.read() for file in files[1:]))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        forks = Forks(Path(folder))
        with closing(forks):
            yield forks


@pytest.fixture(scope="session")
def python(forks: Forks) -> Python:
    """Run Python, as in python("-m", "torchtitan_style", "generate", …)."""

    def run(
        *arguments: object,
        environment: dict[str, str] = ENVIRONMENT,
        cwd: Path | None = None,
        input: str = "",
        timeout: float = 500,
    ) -> subprocess.CompletedProcess[str]:
        environment = environment | {"PYTHON_EXEC": str(forks.executable)}
        return forks.run(*arguments, environment=environment, cwd=cwd, input=input, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def run_ranks(forks: Forks) -> Callable[..., None]:
    """Run a script as the ranks of one gloo group: run_ranks(script, world_size, *arguments)."""

    def run(script: Path, world_size: int, *arguments: object, timeout: float = 400) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with ExitStack() as stack:
            ranks = []
            nothing = stack.enter_context(open(os.devnull))
            for rank in range(world_size):
                environment = ENVIRONMENT | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                output = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
                line, fds = [str(script), *map(str, arguments)], [nothing.fileno(), output.fileno(), output.fileno()]
                ranks.append((stack.enter_context(closing(forks.start(line, environment, None, fds))), output))
            failed = []
            for fork, output in ranks:
                try:
                    status = fork.wait(timeout)
                except TimeoutError:  # have each rank that is left say where it hangs
                    for each, _ in ranks:
                        each.kill(signal.SIGABRT)
                    status = fork.wait(60)
                if status:
                    output.seek(0)
                    failed.append(output.read()[-4000:])
        assert not failed, "\n".join(failed)

    return run


@pytest.fixture(scope="session")
def launch(python: Python) -> Python:
    """Run what ./run_train.sh runs once it is set up: launch(*arguments, nproc=1).

    forked: False for the interpreters that a user would start.
    """

    def run(
        *arguments: object, nproc: int = 1, cwd: Path | None = None, timeout: float = 500, forked: bool = True
    ) -> subprocess.CompletedProcess[str]:
        line = ["-m", "torchtitan_style.launch", *map(str, arguments)]
        environment = ENVIRONMENT | {"NPROC": str(nproc)}
        if forked:
            return python(*line, environment=environment, cwd=cwd, timeout=timeout)
        return subprocess.run(
            [sys.executable, *line],
            env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    return run
