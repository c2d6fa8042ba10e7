"""Plans against real runs on CPU: peak memory and the time of a step, by model, recomputation, rows and processes.

    python benchmarks/planning.py                       # all configurations; an hour on two cores
    python benchmarks/planning.py --only 50M --json planning.json
    python benchmarks/planning.py --published           # no runs: the table of published sizes on 1 to 512 GPUs

Each configuration is trained for some steps by the ordinary command, which records what was planned. Memory is that of
the rank with most, libraries included: the plan's library_gib_cpu stands for them. Times need a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from curves import records

from torchtitan_style.launch.configure import load_config
from torchtitan_style.planner.devices import DEVICES, Assumptions
from torchtitan_style.planner.search import search

MODELS = {
    "50M": ("512", "1536", "12"),
    "120M": ("768", "2304", "14"),
    "400M": ("1024", "4096", "20"),
}
"""Hidden size, intermediate size, layers; heads of 64, a vocabulary of 8192."""

CASES = (
    ("50M", "none", 8, 256, 1),
    ("50M", "full", 8, 256, 1),
    ("50M", "none", 1, 2048, 1),
    ("50M", "none", 4, 256, 2),
    ("120M", "selective", 4, 256, 1),
    ("120M", "full", 1, 2048, 2),
    ("400M", "none", 1, 256, 1),
    ("400M", "full", 1, 2048, 1),
)
"""Model, activation_checkpoint.mode, local rows, tokens of a row, processes."""

STEPS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run those whose model has this name")
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--published", action="store_true")
    arguments = parser.parse_args()
    if arguments.published:
        print("\n".join(published()))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        print(
            "| model | recomputed | rows × tokens | processes | planned GiB | measured | off | planned s | measured |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for case in CASES:
            if arguments.only in case[0]:
                results.append(measured(Path(folder), *case))
                print(line(results[-1]), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2), encoding="utf-8")


def measured(folder: Path, model: str, mode: str, rows: int, seq_len: int, processes: int) -> dict[str, Any]:
    """Train for some steps; what was planned and what was measured."""
    hidden, intermediate, layers = MODELS[model]
    run = folder / f"{model}-{mode}-{rows}-{seq_len}-{processes}"
    settings = {
        "model.flavor": "small", "model.hidden_size": hidden, "model.intermediate_size": intermediate,
        "model.num_hidden_layers": layers, "model.head_dim": "64", "model.max_window_layers": layers,
        "training.steps": STEPS, "training.seq_len": seq_len, "training.local_batch_size": rows,
        "training.global_batch_size": rows * processes, "activation_checkpoint.mode": mode,
        "data.prepared_folder": folder / "data", "validation.enable": "false", "generation.enable": "false",
        "checkpoint.enable": "false", "metrics.log_freq": "1", "metrics.enable_tensorboard": "false",
        "job.dump_folder": run,
    }  # fmt: skip
    command = [sys.executable, "-m", "torchtitan_style", "train"]
    for key, value in settings.items():
        command += [f"--{key}", str(value)]
    environment = os.environ | {
        "NPROC": str(processes),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // processes)),
    }
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    found = records(run)
    planned = next(record for record in found if "planned_memory_gib" in record)
    tokens = rows * processes * seq_len
    return {
        "model": model, "mode": mode, "rows": rows, "seq_len": seq_len, "processes": processes,
        "planned_gib": planned["planned_memory_gib"], "measured_gib": found[-1]["peak_memory_gib"],
        "planned_seconds": planned["planned_step_seconds"],
        "measured_seconds": statistics.median(tokens / record["tokens_per_second"] for record in found[1:]),
    }  # fmt: skip


def line(result: dict[str, Any]) -> str:
    off = result["planned_gib"] / result["measured_gib"] - 1
    return (
        f"| {result['model']} | {result['mode']} | {result['rows']} × {result['seq_len']} | {result['processes']} | "
        f"{result['planned_gib']:.2f} | {result['measured_gib']:.2f} | {off:+.0%} | {result['planned_seconds']:.2f} | "
        f"{result['measured_seconds']:.2f} |"
    )


def published() -> list[str]:
    """The fastest plan for each published size on H100s: a million tokens a step in rows of 4096, compiled."""
    lines = [
        "| model | GPUs | layout | recomputed | rows at once | GiB | tokens/s | MFU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for flavor in ("0.6B", "1.7B", "4B", "8B", "14B", "32B"):
        for gpus in (1, 8, 64, 512):
            lines += fastest("qwen3_8b", flavor, gpus, most=1)
    for gpus in (8, 16, 64, 512):  # several layouts, as it is seldom clear how many ranks should share out the experts
        lines += fastest("qwen3_30b_a3b", "30B-A3B", gpus, most=3)
    return lines


def fastest(name: str, flavor: str, gpus: int, *, most: int) -> list[str]:
    """Rows of the table: the fastest layouts that fit."""
    config = load_config(name, ["--model.flavor", flavor, "--training.global_batch_size", "256"], world_size=None)
    found = search(config, gpus, DEVICES["H100"], Assumptions(), rows=max(256, gpus), most=most)
    lines = []
    for plan in found.best:
        recompute = plan.work.config.activation_checkpoint
        mode = f"{recompute.mode} {recompute.selective_ac_option}" if recompute.mode == "selective" else recompute.mode
        reshard = ", gathered once" if plan.work.keeps_gathered and plan.work.layout.fsdp > 1 else ""
        lines.append(
            f"| {flavor} | {gpus} | {plan.work.layout}{reshard} | {mode} | "
            f"{plan.work.batch.local_batch_size} | {plan.memory.total / 2**30:.1f} | "
            f"{plan.time.tokens_per_second:,.0f} | {plan.time.mfu:.0%} |"
        )
    return lines or [f"| {flavor} | {gpus} | none fits | | | | | |"]


if __name__ == "__main__":
    main()
