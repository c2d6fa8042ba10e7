"""Does a mixture of experts learn more than a dense model of the same active FLOPs?

    python benchmarks/experts_learning.py                               # the debug models, which run out of parameters
    python benchmarks/experts_learning.py --flavor small --steps 450    # an hour, and too few tokens for the experts

Trains both on the default corpus with AdamW: the same rows, learning rate and steps, three seeds each. Prints the final
validation losses and how the experts were used, and plots the curves (matplotlib). A run that is there already is not
repeated. The first takes about ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from curves import curve, plot, records, train

from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.registry import model_config

DENSE = {
    "debug": ("--model.intermediate_size", "128"),  # of 8 experts 64 wide, 2 are active
    "small": (),
}
"""Flavor → what makes the dense model's FLOPs those of the active experts."""
SETTINGS = (
    *("--optimizer.name", "adamw", "--optimizer.lr", "3e-3", "--optimizer.beta1", "0.9"),
    *("--lr_scheduler.warmup_steps", "50", "--validation.freq", "200", "--validation.steps", "16"),
)


def models(flavor: str) -> dict[str, tuple[str, ...]]:
    """Settings of each of the two."""
    shape = ("--model.flavor", flavor, "--model.vocab_size", {"debug": "512", "small": "8192"}[flavor])
    return {"dense": (*shape, *DENSE[flavor]), "experts": ("--model.name", "qwen3_moe", *shape)}


def label(settings: tuple[str, ...]) -> str:
    model = model_config(load_config("qwen3", settings, world_size=1).model)
    total, active = model.num_parameters / 1e6, model.num_active_parameters / 1e6
    if total == active:
        return f"dense, {total:.2f} M parameters"
    return f"{model.num_experts} experts, {active:.2f} M of {total:.2f} M parameters active"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/experts_learning"))
    parser.add_argument("--flavor", choices=DENSE, default="debug")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="file for the plot; in the output folder if left out")
    options, more = parser.parse_known_args()
    both = models(options.flavor)
    curves: dict[str, list[list[tuple[int, float]]]] = {name: [] for name in both}
    losses: dict[str, list[float]] = {name: [] for name in both}
    for seed in range(options.seeds):
        for name, settings in both.items():
            folder = options.output / f"{name}-seed{seed}"
            train(folder, *settings, *SETTINGS, *more, steps=options.steps, seed=seed)
            curves[name].append(curve(folder))
            losses[name].append(curves[name][-1][-1][1])
            used = shares(folder) if name == "experts" else ""
            print(f"{name:8} seed {seed}: validation loss {losses[name][-1]:.4f}{used}", flush=True)
    means = {name: statistics.mean(found) for name, found in losses.items()}
    lower = all(experts < dense for experts, dense in zip(losses["experts"], losses["dense"], strict=True))
    print(f"means: dense {means['dense']:.4f}, experts {means['experts']:.4f}")
    print(f"with the same seed experts {'are better each time' if lower else 'are NOT better each time'}")
    (options.output / "results.json").write_text(json.dumps({"losses": losses, "means": means}, indent=2) + "\n")
    plot({label(both[name]): runs for name, runs in curves.items()}, options.plot or options.output / "curves.png")
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
