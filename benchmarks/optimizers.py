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
from pathlib import Path

from curves import curve, plot, records, train

SHARE = 0.7
PLAIN = (
    *("--optimizer.beta1", "0.9", "--optimizer.muon.per_head", "false", "--lr_scheduler.warmup_steps", "50"),
    *("--validation.steps", "16"),
)
"""What the default configuration has chosen otherwise since."""
SWEEPS = {"adamw": [1e-3, 2e-3, 4e-3], "muon": [1e-3, 2e-3, 4e-3]}


def run(optimizer: str, lr: float, seed: int, *, steps: int, output: Path, adamw_lr: float, more: list[str]) -> Path:
    """Train, if that has not been done, and return the run's folder. Muon's other parameters use ``adamw_lr``."""
    folder = output / f"{optimizer}-{lr:g}-{steps}-seed{seed}"
    settings = ["--optimizer.name", optimizer, "--optimizer.lr", f"{lr:g}", *PLAIN]
    if optimizer == "muon":
        settings += ["--optimizer.muon.lr", f"{lr:g}", "--optimizer.muon.adamw_lr", f"{adamw_lr:g}"]
    train(folder, *settings, *more, steps=steps, seed=seed)
    return folder


def seconds_per_step(folder: Path) -> float:
    """Median over the console lines after the first: the first step is slow."""
    steps = [record for record in records(folder) if "loss" in record][10:]
    tokens = steps[1]["tokens_seen"] - steps[0]["tokens_seen"]
    return tokens / statistics.median(record["tokens_per_second"] for record in steps)


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
    plot(
        {labels[o]: runs for o, runs in curves.items()},
        options.plot or options.output / "curves.png",
        target=("AdamW at the end", means["adamw"]),
    )
    raise SystemExit(0 if reached else 1)


if __name__ == "__main__":
    main()
