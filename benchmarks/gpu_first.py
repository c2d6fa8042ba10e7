"""What is true of this code on a GPU: one verdict a line, in two calls of some six minutes.

    benchmarks/gpu_first.sh outputs/gpu checks     # what must hold, several at once
    benchmarks/gpu_first.sh outputs/gpu speed      # what is measured, one after the other
    benchmarks/gpu_first.sh outputs/gpu masks nccl # single parts
    benchmarks/gpu_first.sh outputs/tiny checks speed --tiny   # small models, to try the script on a CPU

Each part is a process of its own and writes NAME.txt, what it printed, and NAME.json, its verdict and figures; one that
fails or takes too long does not stop the others. Exits with 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from gpu_checks import CHECKS
from gpu_run import Failed, Figures, Part, Run
from gpu_speed import SPEED

ROOT = Path(__file__).parents[1]

WITHOUT_TEXT = {"about", "cuda_tests", "masks", "verify", "nccl", "peak", "kernels", "decoding", "generation"}
"""Parts that need no tokenizer."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="+", help=f"checks, speed, or any of {', '.join([*CHECKS, *SPEED])}")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--at-once", type=int, default=8, help="checks that run side by side")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options.out.resolve(), options.tiny)
    if options.here:
        work(options.parts[0], run)
    groups: dict[str, dict[str, Part]] = {"checks": CHECKS, "speed": SPEED}
    names = [name for part in options.parts for name in groups.get(part, {part: None})]
    if unknown := [name for name in names if name not in CHECKS | SPEED]:
        parser.error(f"unknown part: {unknown[0]}; --help lists them")
    begin = time.perf_counter()
    if not (run.out / "tokenizer").is_dir() and set(names) - WITHOUT_TEXT:
        prepare(run)
        print(f"prepared in {time.perf_counter() - begin:.0f} s", flush=True)
    with ThreadPoolExecutor(options.at_once) as pool:
        good = list(pool.map(lambda name: start(name, run), [name for name in names if name in CHECKS]))
    good += [start(name, run) for name in names if name in SPEED]  # alone, as they are timed
    print(f"{sum(good)} of {len(good)} parts are good, {time.perf_counter() - begin:.0f} s; more in {run.out}")
    return 0 if all(good) else 1


def prepare(run: Run) -> None:
    """A tokenizer for all parts."""
    folder = run.out / "first"
    run_quietly = ["-m", "torchtitan_style", "prepare", "--job.dump_folder", str(folder), "--model.flavor", "debug"]
    subprocess.run([sys.executable, *run_quietly], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (folder / "tokenizer").rename(run.out / "tokenizer")


def start(name: str, run: Run) -> bool:
    """Run a part in a process of its own; print and keep its verdict."""
    seconds = (CHECKS | SPEED)[name].seconds
    command = [sys.executable, __file__, str(run.out), name, "--here", *(["--tiny"] if run.tiny else [])]
    begin = time.perf_counter()
    result = run.out / f"{name}.json"
    result.unlink(missing_ok=True)
    with (run.out / f"{name}.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(seconds)
            said = "ended without a verdict"
        except subprocess.TimeoutExpired:
            said = f"took more than {seconds} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    found = json.loads(result.read_text()) if result.is_file() else {"good": False, "verdict": said}
    found["seconds"] = round(time.perf_counter() - begin, 1)
    result.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{'good' if found['good'] else 'BAD '} {name} ({found['seconds']:.0f} s): {found['verdict']}", flush=True)
    return bool(found["good"])


def work(name: str, run: Run) -> NoReturn:
    """Carry a part out in this process, and leave its verdict."""
    good = True
    figures: Figures = {}
    try:
        verdict, figures = (CHECKS | SPEED)[name].action(run)
    except Failed as error:
        good, verdict = False, str(error)
    except Exception as error:
        import traceback

        traceback.print_exc()
        good, verdict = False, f"{type(error).__name__}: {error}"
    answer = {"good": good, "verdict": verdict, "figures": figures}
    (run.out / f"{name}.json").write_text(json.dumps(answer, default=str))
    sys.stdout.flush()
    os._exit(0)  # without the warnings of a process group that is still open


if __name__ == "__main__":
    raise SystemExit(main())
