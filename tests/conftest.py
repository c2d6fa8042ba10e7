"""What all tests share: how to start ranks and commands as real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Two tests run at once on two cores: one thread each.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """Run a script as the ranks of one gloo group: run_ranks(script, world_size, *arguments)."""

    def run(script: Path, world_size: int, *arguments: object, timeout: float = 500) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = []
        for rank in range(world_size):
            environment = ENVIRONMENT | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            command = [sys.executable, str(script), *map(str, arguments)]
            processes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        failed = [o for p, o in zip(processes, outputs, strict=True) if p.returncode]
        assert not failed, "\n".join(output[-4000:] for output in failed)

    return run


@pytest.fixture(scope="session")
def launch() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run what ./run_train.sh runs once it is set up: launch(*arguments, nproc=1)."""

    def run(
        *arguments: object, nproc: int = 1, cwd: Path | None = None, timeout: float = 500
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torchtitan_style.launch", *map(str, arguments)]
        environment = ENVIRONMENT | {"NPROC": str(nproc)}
        return subprocess.run(
            command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run
