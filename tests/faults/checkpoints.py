"""Checkpoints of a tiny model, for tests that cut saves short or damage what was saved. Run by ``zygote.py``.

kill FOLDER MODE     SIGKILL a save at each of its dealings with files, and look at what is left
open FOLDER …        resume from each folder; a line of JSON for each
make FOLDER          save steps 1 and 2
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from torchtitan_style.checkpoint import checkpointer as checkpointers
from torchtitan_style.checkpoint.checkpointer import Checkpointer
from torchtitan_style.common.errors import UserError
from torchtitan_style.config.layout import Layout
from torchtitan_style.config.schema import Checkpoint, LRScheduler, Optimizer
from torchtitan_style.distributed.world import init_world
from torchtitan_style.models.qwen3.spec import QWEN3
from torchtitan_style.optim.build import Optimizers


def main(arguments: list[str]) -> None:
    action, folder, *rest = arguments
    if action == "kill":
        kill_everywhere(Path(folder), rest[0])
    elif action == "open":
        for each in (folder, *rest):
            assert in_a_child(lambda each=each: open_again(Path(each))) == 0
    else:
        assert in_a_child(lambda: make(Path(folder))) == 0


def in_a_child(action: Callable[[], None]) -> int:
    """Its exit status, or minus the signal that ended it."""
    sys.stdout.flush()
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        action()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


# A process by itself


def checkpointer(folder: Path, say: Callable[[str], None] = print, **settings: Any) -> Checkpointer:
    init_world(Layout(), timeout_seconds=60)
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8))
    optimizer = Optimizers(
        model, Optimizer(), LRScheduler(warmup_steps=1), total_steps=10, dtype=torch.float32, spec=QWEN3, head_dim=8
    )
    tokenizer = folder.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    folder.mkdir(exist_ok=True)
    return Checkpointer(
        Checkpoint(**settings),
        folder / "checkpoint",
        model=model,
        optimizer=optimizer,
        settings="settings",
        tokenizer=tokenizer,
        about={"mesh": {}},
        say=say,
    )


def set_values(checkpoints: Checkpointer, step: int) -> None:
    for number, tensor in enumerate(checkpoints._tensors().values()):
        tensor.fill_(100 * step + number)


def values(checkpoints: Checkpointer) -> list[set[float]]:
    return [set(tensor.flatten().tolist()) for tensor in checkpoints._tensors().values()]


def expected(checkpoints: Checkpointer, step: int) -> list[set[float]]:
    return [{100.0 * step + number} for number in range(len(checkpoints._tensors()))]


def save(checkpoints: Checkpointer, step: int) -> None:
    set_values(checkpoints, step)
    checkpoints.save(step, {"step": step}, figures={}, best=True)
    if checkpoints.config.async_mode == "async":
        set_values(checkpoints, 9)  # training goes on


def make(folder: Path) -> None:
    checkpoints = checkpointer(folder)
    for step in (1, 2):
        save(checkpoints, step)
    checkpoints.close()


def open_again(folder: Path) -> None:
    """What a resume does; nothing may be read into the model but by DCP."""
    said: list[str] = []
    loaded: list[str] = []
    result: dict[str, Any] = {"found": None, "error": None}
    real = dcp.load

    def load(*arguments: Any, storage_reader: Any, **more: Any) -> None:
        loaded.append(Path(storage_reader.path).name)
        real(*arguments, storage_reader=storage_reader, **more)

    checkpointers.dcp.load = load
    checkpoints = checkpointer(folder, said.append)
    set_values(checkpoints, 7)
    try:
        result["found"] = found = checkpoints.find(-1)
        if found is not None:
            checkpoints.load(found)
            assert values(checkpoints) == expected(checkpoints, found)
    except UserError as error:
        result["error"] = str(error)
        assert values(checkpoints) == expected(checkpoints, 7), "weights were touched"
    print(json.dumps(result | {"said": said, "loaded": loaded}), flush=True)


# Cutting saves short


def kill_everywhere(folder: Path, mode: str) -> None:
    """Each time one dealing with files later, until there is none left."""
    settings: dict[str, Any] = {"async_mode": mode, "keep_latest_k": 1}
    number = 0
    while True:
        number += 1
        run, log = folder / str(number), folder / f"{number}.events"
        status = in_a_child(lambda: killed_at(run, log, number, settings))  # noqa: B023
        assert status in (-signal.SIGKILL, 0), status
        events = log.read_text().splitlines()
        assert in_a_child(lambda: look(run, events, settings)) == 0, f"after {events[-1]}, number {number}"  # noqa: B023
        if status == 0:
            break


def killed_at(run: Path, log: Path, number: int, settings: dict[str, Any]) -> None:
    """Save step 1, and die at a dealing with files of saving step 2: just before what the log says last."""
    checkpoints = checkpointer(run, **settings)
    save(checkpoints, 1)
    checkpoints.finish()
    count = 0
    log_file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def event(name: str, path: Any) -> None:
        nonlocal count
        count += 1
        os.write(log_file, f"{name} {os.path.relpath(path, run / 'checkpoint')}\n".encode())
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
            path = arguments[1] if name == "os.rename" else arguments[0]
            if isinstance(path, str | bytes | os.PathLike) and is_ours(path):
                event(name, os.fspath(path))

    def is_ours(path: Any) -> bool:
        return str(os.fspath(path)).startswith(str(run)) or not os.path.isabs(path)  # rmtree's are relative

    real = os.fsync

    def fsync(descriptor: int) -> None:
        event("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    os.fsync = fsync
    sys.addaudithook(audit)
    save(checkpoints, 2)
    checkpoints.close()
    count = -1000  # what comes now is not the save's
    os.write(log_file, b"end\n")


def look(run: Path, events: list[str], settings: dict[str, Any]) -> None:
    """Step 2 once it has its name, step 1 before; whole, and the next save clears up."""
    published = "os.rename step-2" in events[:-1]
    checkpoints = checkpointer(run, lambda line: sys.exit(f"said: {line}"), **settings)
    found = checkpoints.find(-1)
    assert found == 2 if published else found == 1, (found, events[-1])
    assert checkpoints.folder.train_state(found) == {"step": found}
    assert checkpoints.folder.best() in (1, 2)
    set_values(checkpoints, 5)
    checkpoints.load(found)
    assert values(checkpoints) == expected(checkpoints, found)
    save(checkpoints, 3)
    checkpoints.close()
    left = {path.name for path in checkpoints.folder.root.iterdir()}
    assert left == {"best", "step-3"}, left
    assert checkpoints.folder.best() == 3
    assert checkpoints.folder.problem(3) is None
