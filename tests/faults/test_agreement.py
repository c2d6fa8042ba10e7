"""What one rank knows, all know one call later, at the same call."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from torch import distributed as dist

from tests.conftest import ENVIRONMENT, ROOT
from tests.faults.runs import Run, Zygote
from torchtitan_style.train.agreement import Agreement


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_greatest_of_all_is_known_one_call_later(zygote: Zygote, tmp_path: Path, world_size: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        log = tmp_path / f"{rank}.log"
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        env = ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "RUN_LOG": str(log)} | {k: str(v) for k, v in numbers.items()}
        command = ["-m", "tests.faults.agreeing", str(tmp_path)]
        pid = zygote.ask(start={"command": command, "env": env, "cwd": str(ROOT), "log": str(log)})
        ranks.append(Run(zygote, tmp_path, log, pid, 1))
    try:
        for run in ranks:
            assert run.wait() == 0, run.output
    finally:
        for run in ranks:
            run.end()
    expected = [[0, 0]] + [[int(call == 2), 10 * call + world_size - 1] for call in range(5)]
    for rank in range(world_size):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def test_one_process_agrees_with_itself_at_once() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert list(Agreement().exchange(True, 7)) == [True, 7]
    finally:
        dist.destroy_process_group()
