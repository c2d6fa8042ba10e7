"""What saving, verifying and loading a checkpoint cost, against a plain write and read of the same bytes.

    python benchmarks/checkpoint.py [--layers 12] [--repeats 5] [--folder DIR] [--output checkpoint.json]

1. A save against a plain write with fsync of as many bytes, and against the same save without hashing.
2. The time that training stands still for an asynchronous save, as a share of a synchronous one.
3. Verification and loading, from the disk, against a plain read from the disk.
4. A resumed run of the default configuration: from the command to the end of its first step.

One process; alternating repeats, medians. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from torchtitan_style.checkpoint import writer
from torchtitan_style.checkpoint.checkpointer import Checkpointer
from torchtitan_style.checkpoint.manifest import problem_of
from torchtitan_style.config.layout import Layout
from torchtitan_style.config.schema import Checkpoint, LRScheduler, Optimizer
from torchtitan_style.distributed.world import init_world
from torchtitan_style.models.qwen3.config import Qwen3Config
from torchtitan_style.models.qwen3.model import Qwen3ForCausalLM
from torchtitan_style.models.qwen3.spec import QWEN3
from torchtitan_style.optim.build import Optimizers

ROOT = Path(__file__).parents[1]
BLOCK = 2**24


def build(folder: Path, layers: int) -> dict[str, Checkpointer]:
    """The same state behind a synchronous and an asynchronous checkpointer."""
    config = Qwen3Config(
        vocab_size=32_768, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    optimizer = Optimizers(
        model, Optimizer(), LRScheduler(), total_steps=10, dtype=torch.float32, spec=QWEN3, head_dim=config.head_dim
    )
    for state in optimizer.state.values():
        for value in state.values():
            value.normal_()
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    return {
        mode: Checkpointer(
            Checkpoint(async_mode=mode, keep_latest_k=1),  # type: ignore[arg-type]
            folder / mode / "checkpoint",
            model=model,
            optimizer=optimizer,
            settings="",
            tokenizer=tokenizer,
            about={},
            say=print,
        )
        for mode in ("disabled", "async")
    }


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def plain_write(path: Path, size: int, block: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, BLOCK):
            file.write(block[: min(BLOCK, size - start)])
        os.fsync(file.fileno())


def plain_read(path: Path, buffer: bytearray) -> None:
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def forget(*paths: Path) -> None:
    """Have the next read of these files come from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class NoHash:
    """In the place of hashlib.sha256()."""

    def update(self, data: Any) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 64


def measure(folder: Path, layers: int, repeats: int) -> dict[str, float]:
    for mode in ("disabled", "async"):
        (folder / mode).mkdir()
    checkpointers = build(folder, layers)
    sync, background = checkpointers["disabled"], checkpointers["async"]
    plain, block, buffer = folder / "plain", os.urandom(BLOCK), bytearray(BLOCK)
    seconds: dict[str, list[float]] = {}

    def note(name: str, action: Callable[[], Any]) -> None:
        seconds.setdefault(name, []).append(timed(action))

    size = 0
    for step in range(1, repeats + 2):
        note("save", lambda: sync.save(step, {}, figures={}))  # noqa: B023
        sync.finish()  # deletion of the one before
        files = [path for path in sync.folder.path(step).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        note("plain write", lambda: plain_write(plain, size, block))  # noqa: B023
        writer.hashlib = SimpleNamespace(sha256=NoHash)  # type: ignore[assignment]
        note("save without hashing", lambda: without_retention(sync, step + 10_000))  # noqa: B023
        writer.hashlib = hashlib
        shutil.rmtree(sync.folder.path(step + 10_000))

        note("asynchronous save, stall", lambda: background.save(step, {}, figures={}))  # noqa: B023
        note("asynchronous save, rest", background.finish)

        forget(plain, *files)
        note("plain read", lambda: plain_read(plain, buffer))
        note("verify", lambda: problem_of(sync.folder.path(step)))  # noqa: B023
        note("load", lambda: sync.load(step))  # noqa: B023
        forget(*files)
        note("load alone", lambda: sync.load(step))  # noqa: B023
    middle = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first one warms up
    return {"bytes": size, **middle}


def without_retention(checkpointer: Checkpointer, step: int) -> None:
    checkpointer._write(step, checkpointer._tensors(), None, {}, {"best": False})


def resume(folder: Path) -> dict[str, float]:
    """Seconds from the command to the end of the first step after a resume; compilation off."""
    command = [sys.executable, "-m", "torchtitan_style.launch", "--job.dump_folder", str(folder / "run"),
               "--compile.enable", "false", "--validation.enable", "false", "--generation.enable", "false",
               "--metrics.log_freq", "1", "--lr_scheduler.total_steps", "100"]  # fmt: skip
    found = {}
    for name, steps in (("start", 3), ("resume", 4)):
        begin = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--training.steps", str(steps)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        for line in process.stdout:
            if line.startswith("step ") and name not in found:
                found[name] = time.perf_counter() - begin
        process.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to write; a temporary folder if left out")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    init_world(Layout(), timeout_seconds=600)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), options.layers, options.repeats)
        started = resume(Path(folder))
    size = found["bytes"]

    def speed(name: str) -> str:
        return f"{size / found[name] / 1e9:5.2f} GB/s"

    print(f"{size / 1e9:.2f} GB, medians of {options.repeats}")
    ratios = {
        "save, of a plain write": found["plain write"] / found["save"],
        "hashing, of a save without": found["save"] / found["save without hashing"] - 1,
        "asynchronous stall, of a save": found["asynchronous save, stall"] / found["save"],
        "load, of a plain read": found["plain read"] / found["load alone"],
        "verify, of a plain read": found["plain read"] / found["verify"],
        "verify and load, of a plain read": found["plain read"] / (found["verify"] + found["load"]),
    }
    for name in found.keys() - {"bytes"}:
        print(f"  {name:<28}{found[name]:7.2f} s  {speed(name)}")
    for name, ratio in ratios.items():
        print(f"  {name:<36}{ratio:6.0%}")
    print(f"  from the command to the first step: {started['start']:.1f} s, of a resume {started['resume']:.1f} s")
    if options.output:
        options.output.write_text(json.dumps({"seconds": found, "ratios": ratios, **started}, indent=2) + "\n")
    sys.stdout.flush()
    os._exit(0)  # gloo's threads


if __name__ == "__main__":
    main()
