"""A run on two hosts, both of them this machine: the second waits for the first, however long that prepares data."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.conftest import ENVIRONMENT, ROOT, Python

RUN = [
    "-m", "torchtitan_style.launch", "--config", ROOT / "train_configs/qwen3.toml", "--model.flavor", "debug",
    "--training.seq_len", "32", "--training.steps", "3", "--validation.enable", "false",
    "--job.dump_folder", "run",
]  # fmt: skip


def host(python: Python, folder: Path, rank: int, endpoint: str):
    environment = ENVIRONMENT | {"NNODES": "2", "NPROC": "1", "NODE_RANK": str(rank), "RDZV_ENDPOINT": endpoint}
    return python(*RUN, environment=environment, cwd=folder, timeout=200)


def test_the_second_host_waits_for_the_first(python: Python, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(host, python, tmp_path, 1, endpoint)
        time.sleep(3)  # the data takes longer than the second needs to come here
        first = host(python, tmp_path, 0, endpoint)
        assert first.returncode == 0, first.stderr
        assert second.result().returncode == 0, second.result().stderr
    assert f"waiting for the first host, which prepares the data: {endpoint}" in second.result().stdout
    lines = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_an_endpoint_without_a_port_is_refused(python: Python, tmp_path: Path) -> None:
    done = host(python, tmp_path, 1, "localhost")
    assert done.returncode == 2
    assert done.stderr.startswith("error: RDZV_ENDPOINT: several hosts need the first one's address")


def test_an_endpoint_that_is_nowhere_is_one_message(python: Python, tmp_path: Path) -> None:
    done = host(python, tmp_path, 0, "nowhere.invalid:29500")
    assert done.returncode == 2
    assert done.stderr.startswith("error: RDZV_ENDPOINT: nowhere.invalid:29500: ")
