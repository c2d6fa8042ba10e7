"""Muon against AdamW on the default configuration: how many of AdamW's steps does Muon need?

    python benchmarks/optimizers.py --output outputs/optimizers

Sweeps the learning rate of each at one seed, takes each at its best over three seeds, Muon with 70% of AdamW's
steps and a schedule laid out for those, and prints final validation losses and the ratio of times. Every
run is an ordinary one in a folder of its own, and is not repeated if it is there; about half an hour on two
CPU cores. The curves go into a plot (matplotlib), the figures into results.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

SHARE = 0.7
SWEEPS = {"adamw": [1e-3, 2e-3, 4e-3], "muon": [1e-3, 2e-3, 4e-3]}
QUIET = [
    *("--validation.freq", "45", "--generation.enable", "false", "--checkpoint.keep_best", "false"),
    *("--checkpoint.interval", "100000", "--metrics.enable_tensorboard", "false"),
]


def run(optimizer: str, lr: float, seed: int, *, steps: int, output: Path, adamw_lr: float, more: list[str]) -> Path:
    """Train, if that has not been done, and return the run's folder. Muon's other parameters use ``adamw_lr``."""
    folder = output / f"{optimizer}-{lr:g}-{steps}-seed{seed}"
    if not (folder / f"checkpoint/step-{steps}").exists():
        rates = ["--optimizer.lr", f"{lr:g}"]
        if optimizer == "muon":
            rates = ["--optimizer.lr", f"{adamw_lr:g}", "--optimizer.muon.lr", f"{lr:g}"]
        command = [sys.executable, "-m", "torchtitan_style", "train", "--optimizer.name", optimizer, *rates]
        command += ["--training.steps", str(steps), "--training.seed", str(seed), *QUIET, *more]
        done = subprocess.run([*command, "--job.dump_folder", str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
    return folder


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["val_loss"]) for record in records(folder) if "val_loss" in record]


def seconds_per_step(folder: Path) -> float:
    """Median over the console lines after the first: the first step is slow."""
    steps = [record for record in records(folder) if "loss" in record][10:]
    tokens = steps[1]["tokens_seen"] - steps[0]["tokens_seen"]
    return tokens / statistics.median(record["tokens_per_second"] for record in steps)


def plot(curves: dict[str, list[list[tuple[int, float]]]], target: float, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4))
    for color, (label, runs) in zip(("tab:blue", "tab:orange"), curves.items(), strict=True):
        for i, run_curve in enumerate(runs):
            steps, losses = zip(*run_curve[1:], strict=True)  # without the untrained model
            axes.plot(steps, losses, color=color, marker=".", label=label if i == 0 else None)
    axes.axhline(target, color="gray", linewidth=0.8, linestyle="--", label="AdamW at the end")
    axes.set(xlabel="step", ylabel="validation loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/optimizers"))
    parser.add_argument("--steps", type=int, default=450, help="of AdamW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="file for the plot; in the output folder if left out")
    options, more = parser.parse_known_args()
    steps = {"adamw": options.steps, "muon": round(SHARE * options.steps)}
    best: dict[str, float] = {}
    results: dict[str, dict] = {"sweep": {}, "final": {}}
    for optimizer, rates in SWEEPS.items():
        for lr in rates:
            folder = run(
                optimizer,
                lr,
                0,
                steps=steps[optimizer],
                output=options.output,
                adamw_lr=best.get("adamw", 0),
                more=more,
            )
            results["sweep"][f"{optimizer} {lr:g}"] = curve(folder)[-1][1]
            print(f"{optimizer:6}  lr {lr:<7g} {steps[optimizer]} steps: validation loss {curve(folder)[-1][1]:.4f}")
        best[optimizer] = min(rates, key=lambda lr: results["sweep"][f"{optimizer} {lr:g}"])
    curves: dict[str, list] = {}
    seconds: dict[str, float] = {}
    for optimizer in SWEEPS:
        folders = [
            run(
                optimizer,
                best[optimizer],
                seed,
                steps=steps[optimizer],
                output=options.output,
                adamw_lr=best["adamw"],
                more=more,
            )
            for seed in range(options.seeds)
        ]
        curves[optimizer] = [curve(folder) for folder in folders]
        seconds[optimizer] = statistics.median(map(seconds_per_step, folders))
        results["final"][optimizer] = [run_curve[-1][1] for run_curve in curves[optimizer]]
    means = {optimizer: statistics.mean(losses) for optimizer, losses in results["final"].items()}
    print()
    for optimizer, losses in results["final"].items():
        print(
            f"{optimizer:6}  lr {best[optimizer]:<7g} {steps[optimizer]} steps, seeds 0 to {options.seeds - 1}: "
            f"{', '.join(f'{loss:.4f}' for loss in losses)}; mean {means[optimizer]:.4f}; "
            f"{seconds[optimizer] * 1000:.0f} ms a step"
        )
    results["milliseconds"] = {optimizer: 1000 * s for optimizer, s in seconds.items()}
    ratio = seconds["muon"] * steps["muon"] / (seconds["adamw"] * steps["adamw"])
    reached = means["muon"] <= means["adamw"]
    print(
        f"Muon {'reaches' if reached else 'does NOT reach'} AdamW's loss in {SHARE:.0%} of its steps; "
        f"that takes {ratio:.2f} × AdamW's time"
    )
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    labels = {"adamw": f"AdamW, lr {best['adamw']:g}", "muon": f"Muon, lr {best['muon']:g}"}
    plot({labels[o]: runs for o, runs in curves.items()}, means["adamw"], options.plot or options.output / "curves.png")
    raise SystemExit(0 if reached else 1)


if __name__ == "__main__":
    main()
