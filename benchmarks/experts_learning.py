"""Does a mixture of experts learn more than a dense model of the same active FLOPs?

    python benchmarks/experts_learning.py --output outputs/experts_learning

Trains the small dense model and the small mixture of experts on the default configuration with AdamW: the same rows,
learning rate and steps, three seeds each. Prints the final validation losses and how the experts were used, and plots
the curves (matplotlib). A run that is there already is not repeated. About an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from curves import curve, plot, records, train

MODELS = {"dense": "qwen3", "experts": "qwen3_moe"}
SETTINGS = (
    *("--optimizer.name", "adamw", "--optimizer.lr", "2e-3", "--optimizer.beta1", "0.9"),
    *("--lr_scheduler.warmup_steps", "50", "--validation.steps", "16"),
)
LABELS = {"dense": "dense, 5.2 M parameters", "experts": "16 experts, 5.3 M of 12.3 M parameters active"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/experts_learning"))
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="file for the plot; in the output folder if left out")
    options, more = parser.parse_known_args()
    curves: dict[str, list[list[tuple[int, float]]]] = {name: [] for name in MODELS}
    losses: dict[str, list[float]] = {name: [] for name in MODELS}
    for seed in range(options.seeds):
        for name, model in MODELS.items():
            folder = options.output / f"{name}-seed{seed}"
            train(folder, "--model.name", model, *SETTINGS, *more, steps=options.steps, seed=seed)
            curves[name].append(curve(folder))
            losses[name].append(curves[name][-1][-1][1])
            used = shares(folder) if name == "experts" else ""
            print(f"{name:8} seed {seed}: validation loss {losses[name][-1]:.4f}{used}", flush=True)
    means = {name: statistics.mean(found) for name, found in losses.items()}
    lower = max(losses["experts"]) < min(losses["dense"])
    print(f"means: dense {means['dense']:.4f}, experts {means['experts']:.4f}")
    print(f"every run with experts ends {'below' if lower else 'NOT below'} every dense one")
    (options.output / "results.json").write_text(json.dumps({"losses": losses, "means": means}, indent=2) + "\n")
    plot({LABELS[name]: runs for name, runs in curves.items()}, options.plot or options.output / "curves.png")
    raise SystemExit(0 if lower else 1)


def shares(folder: Path) -> str:
    """How the experts were used at the end, in words; by layer, means over the last 50 steps."""
    last = [record for record in records(folder) if "busiest_expert_share" in record][-50:]
    named = {"busiest": "busiest_expert_share", "idlest": "idlest_expert_share"}
    found = {name: zip(*(record[key] for record in last), strict=True) for name, key in named.items()}
    return "".join(
        f"; {name} expert by layer " + ", ".join(f"{statistics.mean(layer):.1%}" for layer in layers)
        for name, layers in found.items()
    )


if __name__ == "__main__":
    main()
