"""What the parts of gpu_first.py share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curves import records

Figures = dict[str, Any]


class Failed(Exception):
    """What a part found is not as it should be."""


@dataclass
class Run:
    """What a part is given: where to write, and whether models are to be small."""

    out: Path
    tiny: bool

    @property
    def flavor(self) -> str:
        return "debug" if self.tiny else "0.6B"

    @property
    def common(self) -> list[str]:
        """Of every training run here: the tokenizer that is made once, and no samples of text."""
        return ["--data.tokenizer", str(self.out / "tokenizer"), "--generation.enable", "false"]

    def program(self, *arguments: object, environment: dict[str, str] | None = None) -> str:
        """Run ``python -m torchtitan_style``; returns what it printed. Raises Failed with the end of it."""
        return self.python("-m", "torchtitan_style", *arguments, environment=environment)

    def python(self, *arguments: object, environment: dict[str, str] | None = None) -> str:
        command = [sys.executable, *map(str, arguments)]
        print("$", *command, flush=True)
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | (environment or {})
        )
        print(done.stdout, flush=True)
        if done.returncode:
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            raise Failed(f"status {done.returncode}: {' / '.join(lines[-2:])[-300:]}")
        return done.stdout

    def train_small(self, name: str, *arguments: object) -> list[Figures]:
        """A run of a model that takes seconds, without validation."""
        small = ("--model.flavor", "debug", "--training.seq_len", 128, "--validation.enable", "false")
        return self.train(name, *small, *arguments)

    def train(self, name: str, *arguments: object) -> list[Figures]:
        """A run in the folder ``name``; returns its metrics."""
        folder = self.out / name
        self.program("train", "--job.dump_folder", folder, *self.common, *arguments)
        return records(folder)


def losses(metrics: Iterable[Figures]) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in metrics if "loss" in record}


def largest_difference(one: dict[int, float], other: dict[int, float]) -> float:
    """Of two curves, relative, over the steps that both have."""
    steps = one.keys() & other.keys()
    if not steps:
        raise Failed("the two curves have no step in common")
    return max(abs(one[step] - other[step]) / abs(one[step]) for step in steps)


@dataclass(frozen=True)
class Part:
    action: Callable[[Run], tuple[str, Figures]]
    seconds: int
    """At most."""
