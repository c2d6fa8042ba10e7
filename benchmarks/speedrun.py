"""Time to a given loss: from the start of the command until the validation loss is what Transformers' Trainer reaches.

    python benchmarks/speedrun.py --output outputs/speedrun
    python benchmarks/speedrun.py --steps 225 -- --optimizer.lr 4e-3     # after "--": settings of our run

The Trainer has a Qwen3 of the same dimensions, the rows that our default run reads in its 450 steps (tokenized
beforehand, which costs it nothing), fused AdamW, bf16 autocast, and the best of several learning rates. Our run has
the default configuration and fewer ``--steps``, with a schedule laid out for those. For each seed the two take turns,
each in a new process, on the whole machine. Ours is timed with nothing prepared ("cold") and with the corpus
prepared and compiled code in the cache ("warm"); the Trainer, uncompiled, has nothing to prepare, and with --compile
its cold time includes compiling.

Needs the extras of Transformers' Trainer (accelerate).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curves import curve
from race import machine, table
from train_step import hf_model

from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import plan_layout
from torchtitan_style.distributed.world import destroy_world, init_world
from torchtitan_style.launch.configure import load_config
from torchtitan_style.metrics.display import Display
from torchtitan_style.train.data import RunData

STEPS = 450
"""Of the Trainer."""
RATES = (1e-3, 2e-3, 4e-3)
"""Learning rates that are tried for the Trainer, at seed 0."""
ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/speedrun"))
    parser.add_argument("--steps", type=int, default=STEPS // 2, help="of ours")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="of the Trainer")
    parser.add_argument("--compile", action="store_true", help="compile the Trainer's model")
    parser.add_argument("--train", metavar="SETTINGS", help=argparse.SUPPRESS)
    parser.add_argument("ours", nargs="*", help="settings of our run")
    arguments = parser.parse_args()
    if arguments.train:
        train(**json.loads(arguments.train))
        return
    output: Path = arguments.output.absolute()
    rows = write_rows(output)
    rate = arguments.rates[0]
    if len(arguments.rates) > 1:
        tried = {lr: trainer(output, rows, lr, seed=0, compile=arguments.compile)["loss"] for lr in arguments.rates}
        print("Trainer, loss by learning rate: " + ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in tried.items()))
        rate = min(tried, key=tried.__getitem__)

    found: dict[str, list[dict[str, float]]] = {"Trainer": [], "ours, cold": [], "ours, warm": []}
    for seed in range(arguments.seeds):
        found["Trainer"].append(trainer(output, rows, rate, seed=seed, compile=arguments.compile))
        for name in ("ours, cold", "ours, warm"):
            more = ["--training.seed", str(seed), "--training.steps", str(arguments.steps), *arguments.ours]
            found[name].append(ours(output, more, cold=name.endswith("cold")))
        print({name: results[-1] for name, results in found.items()}, flush=True)
    report(arguments, found, rate)
    (output / "results.json").write_text(json.dumps({"machine": machine("cpu"), "rate": rate, "runs": found}, indent=2))


def write_rows(output: Path) -> Path:
    """The rows of the default run and its held-out rows, as arrays of inputs and labels."""
    output.mkdir(parents=True, exist_ok=True)
    config = load_config(
        DEFAULT_CONFIG,
        ["--training.steps", str(STEPS), "--job.dump_folder", str(output / "rows")],
        world_size=1,
    )
    world = init_world(plan_layout(config.parallelism, 1), timeout_seconds=60)
    data = RunData(config, world, Display(is_main=True))
    data.loader.start({})
    read = [part for _ in range(STEPS) for part in data.loader.next().microbatches]
    file = output / "rows.npz"
    np.savez(
        file,
        inputs=torch.cat([part[0] for part in read]),
        held_out=torch.cat([batch[0] for batch in data.validation_batches]),
        held_out_labels=torch.cat([batch[1] for batch in data.validation_batches]),
    )
    data.loader.close()
    destroy_world()
    return file


def trainer(output: Path, rows: Path, lr: float, *, seed: int, compile: bool) -> dict[str, float]:
    """The Trainer's validation loss after all its steps, and seconds from its start to there."""
    settings = {"rows": str(rows), "lr": lr, "seed": seed, "compile": compile}
    cache = output / "trainer_cache"
    shutil.rmtree(cache, ignore_errors=True)
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, __file__, "--train", json.dumps(settings)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("trained"):
                seconds = time.perf_counter() - start
            if line.startswith("loss"):
                loss = float(line.split()[1])
    if process.returncode:
        raise SystemExit("the Trainer failed")
    return {"loss": loss, "seconds": seconds}


def train(*, rows: str, lr: float, seed: int, compile: bool) -> None:
    """In a process of its own: train, say "trained", then say the loss on the held-out rows."""
    import transformers

    transformers.set_seed(seed)
    arrays = np.load(rows)
    inputs = torch.from_numpy(arrays["inputs"])
    shape = argparse.Namespace(model="small", rows=8, seq_len=inputs.shape[1], recompute="none", ours=[])
    model, _ = hf_model(shape, "sdpa")
    options: dict[str, Any] = {
        "per_device_train_batch_size": 8, "max_steps": STEPS, "learning_rate": lr, "warmup_steps": 50,
        "lr_scheduler_type": "linear", "weight_decay": 0.1, "adam_beta2": 0.95, "max_grad_norm": 1.0, "bf16": True,
        "optim": "adamw_torch_fused", "torch_compile": compile, "use_cpu": True, "dataloader_pin_memory": False,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": seed,
    }  # fmt: skip
    dataset = [{"input_ids": row, "labels": row} for row in inputs]
    transformers.Trainer(
        model, transformers.TrainingArguments(str(Path(rows).parent / "trainer"), **options), train_dataset=dataset
    ).train()
    print("trained", flush=True)
    model.eval()
    losses = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for ids, labels in zip(
            torch.from_numpy(arrays["held_out"]).split(8),
            torch.from_numpy(arrays["held_out_labels"]).split(8),
            strict=True,
        ):
            logits = model(input_ids=ids).logits.float()
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item())
    print("loss", statistics.mean(losses), flush=True)


def ours(output: Path, settings: list[str], *, cold: bool) -> dict[str, float]:
    """Our run's validation loss at its end, and seconds from its start to there."""
    run, kept = output / "ours", [output / "ours_data", output / "ours_cache"]
    for folder in [run, *(kept if cold else [])]:
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "torchtitan_style", "train", "--config", "qwen3", "--job.dump_folder", str(run)]
    command += ["--data.prepared_folder", str(kept[0]), *settings]
    start = time.perf_counter()
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(kept[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return {"loss": curve(run)[-1][1], "seconds": seconds}


def report(arguments: argparse.Namespace, found: dict[str, list[dict[str, float]]], rate: float) -> None:
    reference = statistics.median(result["seconds"] for result in found["Trainer"])
    rows = []
    for name, results in found.items():
        losses = [result["loss"] for result in results]
        seconds = statistics.median(result["seconds"] for result in results)
        steps = STEPS if name == "Trainer" else arguments.steps
        rows.append(
            (
                name,
                str(steps),
                ", ".join(f"{loss:.4f}" for loss in losses),
                f"{statistics.mean(losses):.4f}",
                f"{seconds:.1f}",
                f"{seconds / reference:.2f}",
            )
        )
    about = machine("cpu")
    print(f"\n{about['device']}, torch {about['torch']}; the Trainer at its best learning rate, {rate:g}\n")
    heads = ("", "steps", "validation loss by seed", "mean", "seconds (median)", "× time of the Trainer")
    print(table(heads, rows))


if __name__ == "__main__":
    main()
