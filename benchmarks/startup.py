"""Seconds from a command to what it is waited for: help, the first training step, the first compiled one.

    python benchmarks/startup.py [--repeats 5] [--only TEXT] [--json startup.json] [--section.key VALUE ...]

1. ``--help``, to its end.
2. ``train`` on the default configuration, uncompiled, until the first step is done: with the corpus prepared by an
   earlier run, and without, so that a tokenizer is trained and the corpus tokenized first.
3. The same compiled, with the corpus prepared: with an empty compile cache, and once more with what that has left.

A step is done when its line is in metrics.jsonl, whose first one is written at once. Validation, sample and
checkpoint are off: they would be before or after that step. Each start is a process of its own, in turns; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from race import machine, table

HELP, PREPARED, UNPREPARED = "--help", "train, corpus prepared", "train, corpus not prepared"
FIRST, SECOND = "train, compiled, first start", "train, compiled, second start"
GOALS = {HELP: 0.3, PREPARED: 8.0}
SHARE = 0.4
"""Of the first compiled start, that the second one may take."""


def until_ended(arguments: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "torchtitan_style", *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def until_first_step(run: Path, arguments: list[str], *, cache: Path) -> float:
    """Seconds until ``train`` has its first step in ``run``'s metrics. It is ended after that."""
    command = [sys.executable, "-m", "torchtitan_style", "train", "--job.dump_folder", str(run), *arguments]
    off = [text for part in ("validation", "generation", "checkpoint") for text in (f"--{part}.enable", "false")]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    metrics = run / "metrics.jsonl"
    begin = time.perf_counter()
    with subprocess.Popen([*command, *off], env=environment, stdout=subprocess.DEVNULL) as process:
        while not (metrics.exists() and "\n" in metrics.read_text(encoding="utf-8")):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended by itself, with status {process.returncode}")
            time.sleep(0.005)
        seconds = time.perf_counter() - begin
        process.send_signal(signal.SIGTERM)
    return seconds


def measure(folder: Path, names: list[str], arguments: list[str], repeats: int) -> dict[str, list[float]]:
    """Seconds of each start, by name; one untimed round of what is not compiled warms up the disk's cache."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    prepared = ["--data.prepared_folder", str(folder / "prepared"), *arguments]
    compiled = [*prepared, "--compile.enable", "true"]
    until_first_step(folder / "preparing", prepared, cache=folder / "none")
    for repeat in range(repeats):

        def start(name: str, given: list[str], cache: str, repeat: int = repeat) -> float:
            return until_first_step(folder / f"{repeat} {name}", given, cache=folder / cache)

        for name in names:
            if name == HELP:
                found = until_ended(["--help"])
            elif name == PREPARED:
                found = start(name, prepared, "none")
            elif name == UNPREPARED:
                found = start(name, arguments, "none")
            else:  # SECOND comes after FIRST and finds its cache
                found = start(name, compiled, f"cache-{repeat}")
            seconds[name].append(found)
            print(f"{repeat + 1}/{repeats} {name}: {found:.2f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("help", "train", "compiled"), help="one of the three parts")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options, arguments = parser.parse_known_args()  # what is left is for the configuration
    parts = {"help": [HELP], "train": [PREPARED, UNPREPARED], "compiled": [FIRST, SECOND]}
    names = [name for part, some in parts.items() if options.only in (None, part) for name in some]
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), names, arguments, options.repeats)
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    goals = GOALS | ({SECOND: SHARE * middle[FIRST]} if FIRST in middle else {})
    rows = [
        (
            name,
            f"{middle[name]:.2f}",
            f"{min(found):.2f} to {max(found):.2f}",
            f"≤ {goals[name]:.1f}" if name in goals else "",
        )
        for name, found in seconds.items()
    ]
    about = machine("cpu")
    print(f"\n{about['device']}, Python {about['python']}, torch {about['torch']}; medians of {options.repeats}\n")
    print(table(("", "seconds", "from … to", "goal"), rows))
    if FIRST in middle:
        print(
            f"\nthe second compiled start takes {middle[SECOND] / middle[FIRST]:.0%} of the first (goal: {SHARE:.0%})"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "seconds": seconds, "medians": middle}, indent=2) + "\n")


if __name__ == "__main__":
    main()
