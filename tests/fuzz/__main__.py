"""The long run: as many cases as you have time for.

python -m tests.fuzz --cases 1000000
python -m tests.fuzz --entry metadata --cases 10000 --seed 7

Prints cases tried, cases a second and each new fault, with the seed of its case; --entry NAME --replay SEED shows that
case again. Ends with status 1 if there are faults.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
import warnings
from random import Random

_SHARE_OF_SLOW = 200
"""Of an entry that starts processes one case is tried for so many of another."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--entry", action="append", help="one of them only; may be given several times")
    parser.add_argument("--replay", type=int, help="the seed of one case")
    options = parser.parse_args()

    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    import torch

    from tests.fuzz.entries import ENTRIES
    from tests.fuzz.trial import Trial

    torch.set_num_threads(1)
    trials = {name: Trial(ENTRIES[name]) for name in options.entry or ENTRIES}
    if options.replay is not None:
        for name, trial in trials.items():
            file, content = trial.case(Random(options.replay))
            print(f"{name}, {file}: {content[:2000]!r}\n{trial.call(file, content) or 'no fault'}")
        return 0
    faults: dict[tuple[str, str], int] = {}
    tried = dict.fromkeys(trials, 0)
    begin = said = time.monotonic()
    round_ = 0
    while sum(tried.values()) < options.cases:
        for name, trial in trials.items():
            if trial.entry.slow and len(trials) > 1 and round_ % _SHARE_OF_SLOW:
                continue
            seed = options.seed * 10**9 + round_
            fault = trial.call(*trial.case(Random(seed)))
            tried[name] += 1
            if fault and (name, fault.partition(": ")[0]) not in faults:
                faults[name, fault.partition(": ")[0]] = seed
                print(f"FAULT: {name}: {fault} (--entry '{name}' --replay {seed})", flush=True)
        round_ += 1
        if time.monotonic() - said > 60:
            said = time.monotonic()
            count = sum(tried.values())
            print(f"{count:,} cases, {count / (said - begin):,.0f} a second, {len(faults)} faults", flush=True)
    seconds = time.monotonic() - begin
    for name, count in tried.items():
        print(f"{count:>10,}  {name}")
    total = sum(tried.values())
    print(f"{total:,} cases in {seconds:,.0f} s ({total / seconds:,.0f} a second), {len(faults)} faults")
    for trial in trials.values():
        trial.close()
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
