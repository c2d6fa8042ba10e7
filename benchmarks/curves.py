"""Ordinary runs that are compared by their validation losses: train, read, plot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

QUIET = [
    *("--validation.freq", "45", "--generation.enable", "false", "--checkpoint.keep_best", "false"),
    *("--checkpoint.interval", "100000", "--metrics.enable_tensorboard", "false"),
]


def train(folder: Path, *settings: str, steps: int, seed: int) -> None:
    """Train the default configuration with other ``settings``, unless that has been done in ``folder``."""
    if (folder / f"checkpoint/step-{steps}").exists():
        return
    command = [sys.executable, "-m", "torchtitan_style", "train", *QUIET, *settings]
    command += ["--training.steps", str(steps), "--training.seed", str(seed), "--job.dump_folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(folder: Path) -> list[tuple[int, float]]:
    """Validation loss by step."""
    return [(record["step"], record["val_loss"]) for record in records(folder) if "val_loss" in record]


def plot(
    curves: dict[str, list[list[tuple[int, float]]]], file: Path, *, target: tuple[str, float] | None = None
) -> None:
    """Draw each label's runs in one colour. target: label and height of a horizontal line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4))
    for color, (label, runs) in zip(("tab:blue", "tab:orange"), curves.items(), strict=True):
        for i, run in enumerate(runs):
            steps, losses = zip(*run[1:], strict=True)  # without the untrained model
            axes.plot(steps, losses, color=color, marker=".", label=label if i == 0 else None)
    if target:
        label, height = target
        axes.axhline(height, color="gray", linewidth=0.8, linestyle="--", label=label)
    axes.set(xlabel="step", ylabel="validation loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)
