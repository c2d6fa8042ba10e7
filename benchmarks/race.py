"""Contenders that take turns, each in processes of its own, so that a slow moment of the machine hits all of them.

A benchmark calls ``race``, which has ``start`` run its own script for each contender. The script, in the contender's
process, calls ``serve`` with the function to be timed. All that the parent sees is seconds and bytes; what
contenders print goes to standard error.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torchtitan_style.cpu.memory import TUNABLES

PEERS = ("HF", "LitGPT")
"""What names of contenders begin with whose processes are started without what the launcher gives to ours."""


class Turns:
    """A contender's side of the pipe. Made before the model is, as memory counts from there."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._before = _memory(device)["now"]
        self._last = time.perf_counter()
        self._seconds: list[float] = []
        self._left = 0

    def wait(self) -> None:
        """Answer for the turn that is over, and wait for the next one; exits after the last."""
        if self._seconds:
            memory = {k: v - self._before for k, v in _memory(self.device).items()}
            _write(self._out, {"seconds": self._seconds, "memory": memory["peak"], "before": self._before})
            self._seconds = []
        if int(os.environ.get("RANK", "0")) == 0:
            self._left = int(sys.stdin.readline() or 0)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch
            import torch.distributed as dist

            left = torch.tensor(self._left, device=self.device)
            dist.broadcast(left, 0)
            self._left = int(left)
        if not self._left:
            os._exit(0)
        _forget_peak(self.device)
        self._last = time.perf_counter()

    def step_is_done(self) -> None:
        """To be called after each step."""
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._last = now
        self._left -= 1
        if not self._left:
            self.wait()


def serve(turns: Turns, step: Callable[[], Any]) -> None:
    """Run ``step`` as often as asked, until there is nobody to ask."""
    gc.collect()
    turns.wait()
    while True:
        step()
        turns.step_is_done()


class Racer:
    """One contender, as its benchmark sees it."""

    def __init__(self, name: str, processes: list[subprocess.Popen[str]]) -> None:
        self.name, self._processes = name, processes
        self.seconds: list[float] = []
        """Of a step: the median of each turn."""
        self.memory = 0
        """Most bytes that the first process took, beyond what it had before the model was built."""
        self.before = 0
        """Bytes that the first process had by then."""
        self.first: list[float] = []
        """Seconds of the steps that it was warmed up with."""
        self.ratio = 1.0
        """Times the time of the one that it takes turns with."""
        self.step_seconds = 0.0
        """Of a step, as if it had had all the moments that the one that all take turns with had."""
        self.more: dict[str, Any] = {}
        """What else its benchmark knows of it."""

    def warm_up(self, steps: int) -> None:
        self.first = self._ask(steps)["seconds"]

    def turn(self, steps: int) -> float:
        """Seconds of a step, the median of so many."""
        answer = self._ask(steps)
        self.seconds.append(statistics.median(answer["seconds"]))
        self.memory, self.before = max(self.memory, answer["memory"]), answer["before"]
        return self.seconds[-1]

    def _ask(self, steps: int) -> dict[str, Any]:
        main = self._processes[0]
        assert main.stdin
        assert main.stdout
        print(steps, file=main.stdin, flush=True)
        line = main.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended by itself, with status {main.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        for process in self._processes:
            if process.stdin:
                process.stdin.close()
        for process in self._processes:
            process.wait()

    @property
    def figures(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "seconds": self.step_seconds,
            "turns": self.seconds,
            "memory_bytes": self.memory,
            "memory_before_bytes": self.before,
            "first_step_seconds": self.first[0] if self.first else None,
            **self.more,
        }


def start(
    name: str,
    script: str,
    arguments: argparse.Namespace,
    *more: str,
    processes: int = 1,
    threads: int | None = None,
    environment: dict[str, str] | None = None,
) -> Racer:
    """Start ``script`` to be the contender ``name``, once per process, with torchrun's variables if there are several.

    more: of its command line, beside the options of every race.
    """
    given = ["--model", arguments.model, "--rows", str(arguments.rows), "--seq-len", str(arguments.seq_len)]
    command = [sys.executable, script, *given, "--serve", name, *more, *arguments.ours]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parent.parent)
    started = []
    for rank in range(processes):
        variables = (
            os.environ
            | {
                "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
                "TOKENIZERS_PARALLELISM": "false",
            }
            | (environment or {})
        )
        if not name.startswith(PEERS):
            variables.setdefault(*TUNABLES)
        if threads:
            variables["OMP_NUM_THREADS"] = str(threads)
        if processes > 1:
            variables |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
            }
        started.append(
            subprocess.Popen(
                command,
                env=variables,
                stdin=subprocess.DEVNULL if rank else subprocess.PIPE,
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                text=True,
            )
        )
    return Racer(name, started)


def race(contenders: Iterable[str], begin: Callable[[str], Racer], arguments: argparse.Namespace) -> list[Racer]:
    """Let each contender that ``arguments`` ask for take turns with the first one, which always takes part.

    begin: starts one and warms it up. Ratios are medians over turns that were side by side.
    """
    first, *others = contenders
    reference = begin(first)
    racers = [reference]
    for name in others:
        if arguments.only and not any(text in name for text in arguments.only):
            continue
        racer = begin(name)
        ratios = []
        for _ in range(arguments.repeats):
            alone = reference.turn(arguments.steps)
            ratios.append(racer.turn(arguments.steps) / alone)
        racer.stop()
        racer.ratio = statistics.median(ratios)
        print(f"{name}: {racer.ratio:.2f} times the time of {first}", flush=True)
        racers.append(racer)
    if len(racers) == 1:
        for _ in range(arguments.repeats):
            reference.turn(arguments.steps)
    reference.stop()
    for racer in racers:
        racer.step_seconds = racer.ratio * statistics.median(reference.seconds)
    return racers


def parser_of(
    description: str | None, contenders: Iterable[str] | None, models: Iterable[str]
) -> argparse.ArgumentParser:
    """The options of every race: of the model, of the turns, and which contender a process is to be."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="small", choices=models)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="contenders with this in the name")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--serve", choices=contenders, help=argparse.SUPPRESS)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line. What ``parser`` does not know is for our config: ``ours``."""
    arguments, ours = parser.parse_known_args()
    arguments.ours = ours
    return arguments


def write(arguments: argparse.Namespace, about: dict[str, str], racers: Sequence[Racer]) -> None:
    """All figures, to the file that ``--json`` names, if any."""
    if arguments.json:
        given = {key: value for key, value in vars(arguments).items() if key not in ("json", "serve")}
        figures = {racer.name: racer.figures for racer in racers}
        text = json.dumps({"machine": about, "arguments": given, "contenders": figures}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a Markdown table."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join(map(line, [heads, rule, *rows]))


def machine(device: str) -> dict[str, str]:
    """What the figures were taken on."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(), **versions}
    model = platform.processor()
    if sys.platform == "linux":
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        named = re.search(r"model name\s*:\s*(.*)", text)
        extras = [x for x in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if re.search(rf"\b{x}\b", text)]
        model = f"{named[1] if named else model} ({extras[0] if extras else 'no AVX2'})"
    return {"device": f"{model}, {torch.get_num_threads()} threads", **versions}


def _memory(device: str) -> dict[str, int]:
    if device.startswith("cuda"):
        import torch

        return {"now": torch.cuda.memory_reserved(), "peak": torch.cuda.max_memory_reserved()}
    status = Path("/proc/self/status").read_text(encoding="ascii")
    values = {key: int(kib) * 1024 for key, kib in re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status)}
    return {"now": values["VmRSS"], "peak": values["VmHWM"]}


def _forget_peak(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _write(file: Any, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=file, flush=True)
