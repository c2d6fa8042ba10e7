"""Starting runs that will be killed, stopped and resumed, and reading what they leave."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.conftest import ENVIRONMENT, ROOT
from tests.data.corpora import words, write_jsonl
from tests.faults.zygote import started

CURVE = ("loss", "grad_norm", "lr", "batch_hash", "tokens_seen")
PATIENCE = 200.0
"""Seconds that anything may take: the machine may be busy. No test waits for it to pass."""


class Zygote:
    """See ``zygote.py``."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


class Run:
    """A run that was started: its launcher, or its only process."""

    def __init__(self, zygote: Zygote, folder: Path, log: Path, pid: int, nproc: int) -> None:
        self.zygote, self.folder, self.log, self.pid, self.nproc = zygote, folder, log, pid, nproc
        self.status: int | None = None

    def poll(self) -> int | None:
        if self.status is None:
            self.status = self.zygote.ask(poll=self.pid)
        return self.status

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit status."""
        self._until(lambda: self.poll() is not None, timeout, "ended")
        assert self.status is not None
        return self.status

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for something that must happen before the run ends."""
        self._until(lambda: condition() or self.poll() is not None, PATIENCE, what)
        assert condition(), f"it ended before: {what}\n{self.output}"

    def _until(self, condition: Callable[[], Any], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not after {timeout} s: {what}\n{self.output}"
            time.sleep(0.01)

    def at_step(self, step: int) -> None:
        self.until(lambda: max(steps(self.folder), default=0) >= step, f"step {step}")

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def ranks(self) -> dict[int, int]:
        """pids of the ranks that live."""
        if self.nproc == 1:
            return {0: self.pid} if self.poll() is None else {}
        found = {}
        for rank in range(self.nproc):
            file = Path(f"{self.log}.rank-{rank}")
            pid, _, since = (file.read_text() if file.exists() else "").partition(" ")
            if since and is_alive(int(pid)) and started(int(pid)) == since:  # and not another process by now
                found[rank] = int(pid)
        return found

    def signal(self, number: int, rank: int | None = None) -> None:
        """To a rank, or to the launcher."""
        os.kill(self.pid if rank is None else self.ranks()[rank], number)

    def end(self) -> None:
        """Leave nothing behind."""
        for pid in (*self.ranks().values(), self.pid):
            if pid != self.pid or self.poll() is None:
                for kill in (os.killpg, os.kill):
                    try:
                        kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
        self.wait()


def is_alive(pid: int) -> bool:
    """Zombies are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Command:
    """Run a module's ``main`` to its end, which must be a good one; returns what it printed."""

    def __init__(self, zygote: Zygote, scratch: Path) -> None:
        self.zygote, self.scratch = zygote, scratch

    def __call__(self, module: str, *arguments: object, status: int = 0) -> str:
        log = self.scratch / f"{module}.log"
        log.unlink(missing_ok=True)
        command = ["-m", module, *map(str, arguments)]
        pid = self.zygote.ask(start={"command": command, "env": ENVIRONMENT, "cwd": str(ROOT), "log": str(log)})
        run = Run(self.zygote, self.scratch, log, pid, 1)
        try:
            assert run.wait() == status, run.output
        finally:
            run.end()
        return run.output


class Runs:
    """The runs of one test or module."""

    def __init__(self, zygote: Zygote, corpus: Path, scratch: Path) -> None:
        self.zygote, self.corpus, self.scratch = zygote, corpus, scratch
        self.config = corpus / "config.toml"
        self._started: list[Run] = []

    def folder(self, name: str) -> Path:
        """A dump folder in which the data is prepared already."""
        folder = self.scratch / name
        prepared = self.corpus / "prepared"
        if not folder.exists() and prepared.exists():
            folder.mkdir()
            for part in ("tokenizer", "data"):
                shutil.copytree(prepared / part, folder / part)
        return folder

    def start(
        self,
        folder: Path | str,
        *options: object,
        nproc: int = 1,
        faults: list[dict[str, Any]] | None = None,
        env: dict[str, str] | None = None,
        config: Path | None = None,
    ) -> Run:
        """./run_train.sh, once it is set up, into ``folder``, in the background."""
        folder = self.folder(folder) if isinstance(folder, str) else folder
        log = self.scratch / f"{folder.name}-{len(self._started)}.log"
        environment = ENVIRONMENT | {"NPROC": str(nproc), "RUN_LOG": str(log)} | (env or {})
        if faults:
            environment["FAULTS"] = json.dumps(faults)
        arguments = ["--config", config or self.config, "--job.dump_folder", folder, *options]
        command = ["-m", "torchtitan_style.launch.launcher", *map(str, arguments)]
        pid = self.zygote.ask(start={"command": command, "env": environment, "cwd": str(ROOT), "log": str(log)})
        run = Run(self.zygote, folder, log, pid, nproc)
        self._started.append(run)
        return run

    def __call__(self, folder: Path | str, *options: object, status: int = 0, **how: Any) -> Run:
        """The same, to its end."""
        run = self.start(folder, *options, **how)
        run.wait()
        assert run.status == status, f"status {run.status}\n{run.output}"
        if status in (0, 2):
            assert "Traceback" not in run.output, run.output
        return run

    def end(self) -> None:
        for run in self._started:
            run.end()


def write_corpus(folder: Path) -> None:
    write_jsonl(folder / "corpus.jsonl", words(120, lengths=(20, 120)))
    (folder / "config.toml").write_text(f"""
[model]
flavor = "debug"
hidden_size = 32
intermediate_size = 64
head_dim = 8
[data]
dataset = "files"
paths = ["{folder}/corpus.jsonl"]
[training]
steps = 20
seq_len = 16
global_batch_size = 4
local_batch_size = -1
mixed_precision_param = "float32"
[optimizer]
lr = 1e-3
[lr_scheduler]
warmup_steps = 4
total_steps = 20
[checkpoint]
interval = 4
[validation]
freq = 8
steps = 1
[generation]
enable = false
[metrics]
enable_tensorboard = false
log_freq = 1
[comm]
shutdown_timeout_seconds = 90
""")


def records(folder: Path, key: str) -> dict[int, Any]:
    """Step → figure. The last line may be on its way."""
    found = {}
    file = folder / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else ():
        if line.endswith("\n") and key in (record := json.loads(line)):
            assert record["step"] not in found, f"step {record['step']} twice"
            found[record["step"]] = record[key]
    return found


def steps(folder: Path) -> dict[int, Any]:
    return records(folder, "loss")


def curve(folder: Path) -> dict[str, dict[int, Any]]:
    """All that must be the same to the last bit, however often a run was stopped. Validation, too."""
    keys = (*CURVE, "val_loss", "val_perplexity", "val_accuracy")
    return {key: records(folder, key) for key in keys}


def tensors(checkpoint: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, whatever layout wrote it."""
    dcp_to_torch_save(checkpoint, scratch / "all.pt")
    return torch.load(scratch / "all.pt")


def same_tensors(one: Path, other: Path, scratch: Path, *, but: str = "") -> None:
    """Assert that two checkpoints hold the same, to the bit."""
    a, b = tensors(one, scratch), tensors(other, scratch)
    assert a.keys() == b.keys()
    assert any(name.startswith("optimizer.") for name in a)
    different = [name for name in a if not torch.equal(a[name], b[name]) and not (but and but in name)]
    assert not different, f"{one} and {other} differ in {different}"
