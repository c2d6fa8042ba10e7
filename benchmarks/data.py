"""What preparing, loading and streaming a corpus cost.

    python benchmarks/data.py [--megabytes 24] [--repeats 3] [--output data.json]

1. Preparation against ``datasets.map`` with the same tokenizer and number of processes, alternating.
2. What the loader gives, prepared and streamed, against what a compiled training step of the default model needs.
3. The share of a training step that waits for data.
4. Peak memory of preparing and of streaming, on a corpus and on one ten times as large.

The corpus is cut from the standard library's sources, in documents of some 3 kB as JSON lines. Nothing else should
run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from curves import records

ROOT = Path(__file__).parents[1]
VOCABULARY = 8192


def write_corpus(path: Path, megabytes: float) -> None:
    """JSON lines; every document begins with its number, so that none is like another."""
    import sysconfig

    library = Path(sysconfig.get_path("stdlib"))
    text = "".join(file.read_text(errors="replace") for file in sorted(library.glob("*.py")))
    written = number = 0
    with path.open("w") as file:
        while written < megabytes * 1e6:
            start = number * 2741 % (len(text) - 6000)
            line = json.dumps({"text": f"# {number}\n{text[start : start + 1000 + number * 7919 % 4000]}"}) + "\n"
            written += file.write(line)
            number += 1


def options(corpus: Path, folder: Path, *more: str) -> list[str]:
    """Arguments for a run on ``corpus`` into ``folder``."""
    return [
        *("--job.dump_folder", str(folder), "--data.dataset", "files", "--data.paths", str(corpus)),
        *("--data.validation_fraction", "0.01", "--validation.steps", "2", *more),
    ]


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "torchtitan_style", *arguments]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)


def peak_memory(*command: str) -> float:
    """Most MiB that a command and its processes held at once, pages that they share counted once per process."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = 0

    def resident(pid: int) -> int:
        try:
            own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            # Mapped token files are the page cache's and can be dropped at any time.
            shared = int(Path(f"/proc/{pid}/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return 0
        return own - shared + sum(resident(int(child)) for child in children)

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    assert process.wait() == 0
    thread.join()
    return peak / 2**20


MAP = """
import os, sys, time
import datasets, transformers
datasets.disable_caching(); datasets.disable_progress_bars()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[2])
begin = time.perf_counter()
data = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[3])
end = tokenizer.eos_token_id
def encode(batch):
    ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return {"ids": [document + [end] for document in ids]}
data = data.map(encode, batched=True, num_proc=int(sys.argv[4]), remove_columns=data.column_names)
data.save_to_disk(sys.argv[3] + "/saved")
print(time.perf_counter() - begin)
"""


def preparation(work: Path, corpus: Path, tokenizer: Path, repeats: int, processes: int) -> dict[str, Any]:
    ours, theirs = [], []
    for _ in range(repeats):
        shutil.rmtree(work / "prepared", ignore_errors=True)
        more = ("--data.tokenizer", str(tokenizer), "--model.vocab_size", str(VOCABULARY))
        begin = time.perf_counter()
        run("prepare", *options(corpus, work / "prepared", *more), "--processes", str(processes))
        ours.append(time.perf_counter() - begin)
        shutil.rmtree(work / "map", ignore_errors=True)
        command = [sys.executable, "-c", MAP, str(corpus), str(tokenizer), str(work / "map"), str(processes)]
        theirs.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
    manifest = json.loads((work / "prepared/data/manifest.json").read_text())
    tokens = sum(manifest["corpora"][""]["tokens"].values())
    mine, other = statistics.median(ours), statistics.median(theirs)
    return {
        "tokens": tokens,
        "prepare tokens/s": round(tokens / mine),  # start of Python and hashing of the corpus included
        "datasets.map tokens/s": round(tokens / other),  # without the start of Python
        "ratio": round(other / mine, 2),
    }


LOADER = """
import json, sys, time
from torchtitan_style.launch.configure import load_config
from torchtitan_style.config.layout import plan_layout
from torchtitan_style.distributed.world import init_world
from torchtitan_style.train.stopping import ending_at_once
from torchtitan_style.metrics.display import Display
from torchtitan_style.train.data import RunData
if __name__ == "__main__":
    with ending_at_once():
        config = load_config("train_configs/qwen3.toml", sys.argv[2:])
        world = init_world(plan_layout(config.parallelism, 1), timeout_seconds=60)
        data = RunData(config, world, Display(is_main=False))
        data.loader.start({})
        for _ in range(20):
            data.loader.next()
        begin = time.perf_counter()
        steps = 0
        while time.perf_counter() - begin < 3:
            data.loader.next()
            steps += 1
        rows = data.batch_plan.global_batch_size
        speed = steps * rows * config.training.seq_len / (time.perf_counter() - begin)
        open(sys.argv[1], "w").write(str(speed))
        data.loader.close()
"""

KINDS = {
    "prepared": (),
    "prepared, best_fit": ("--data.packing", "best_fit"),
    "streamed": ("--data.streaming", "true"),
    "streamed, 1 worker": ("--data.streaming", "true", "--data.num_workers", "1"),
    "streamed, best_fit": ("--data.streaming", "true", "--data.packing", "best_fit"),
}


def loaders(work: Path, corpus: Path, tokenizer: Path, repeats: int) -> dict[str, Any]:
    (work / "loader.py").write_text(LOADER)
    speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    needs, waits = [], []
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for repeat in range(repeats):
        for number, (kind, more) in enumerate(KINDS.items()):
            arguments = options(corpus, work / f"loader-{number}", "--data.tokenizer", str(tokenizer), *more)
            command = [sys.executable, str(work / "loader.py"), str(work / "speed"), *arguments]
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
            speeds[kind].append(float((work / "speed").read_text()))
        folder = work / f"training-{repeat}"
        more = (
            "--training.steps",
            "40",
            "--metrics.log_freq",
            "10",
            "--compile.enable",
            "--generation.enable",
            "false",
        )
        run(
            "train", *options(corpus, folder, "--data.tokenizer", str(tokenizer), *more, "--checkpoint.enable", "false")
        )
        last = [record for record in records(folder) if "loss" in record][-1]
        needs.append(last["tokens_per_second"])
        waits.append(last["data_wait_fraction"])
    need = statistics.median(needs)
    medians = {kind: statistics.median(found) for kind, found in speeds.items()}
    return {
        "training tokens/s": round(need),
        "share of a step waiting for data": round(statistics.median(waits), 5),
        "loader tokens/s": {kind: round(speed) for kind, speed in medians.items()},
        "loader / training": {kind: round(speed / need, 1) for kind, speed in medians.items()},
    }


def memory(work: Path, tokenizer: Path, megabytes: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, size in (("corpus", megabytes), ("ten times the corpus", 10 * megabytes)):
        corpus = work / f"{size}.jsonl"
        write_corpus(corpus, size)
        more = ("--data.tokenizer", str(tokenizer))
        prepare = ("-m", "torchtitan_style", "prepare", *options(corpus, work / "memory", *more), "--processes", "2")
        found[f"prepare, {name} (MiB)"] = round(peak_memory(*prepare))
        streamed = options(corpus, work / "memory-streamed", *more, "--data.streaming", "true")
        command = (str(work / "loader.py"), str(work / "speed"), *streamed)
        os.environ["PYTHONPATH"] = str(ROOT)
        found[f"stream, {name} (MiB)"] = round(peak_memory(*command))
        for folder in ("memory", "memory-streamed"):
            shutil.rmtree(work / folder)
        corpus.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        corpus = work / "corpus.jsonl"
        write_corpus(corpus, arguments.megabytes)
        run("prepare", *options(corpus, work / "first"))  # for its tokenizer
        tokenizer = work / "first/tokenizer"
        results = {
            "preparation": preparation(work, corpus, tokenizer, arguments.repeats, processes=2),
            "loading": loaders(work, corpus, tokenizer, arguments.repeats),
            "memory": memory(work, tokenizer, arguments.megabytes),
        }
    for title, figures in results.items():
        print(title)
        for name, value in figures.items():
            if isinstance(value, dict):
                print(f"  {name}")
                for kind, number in value.items():
                    print(f"    {kind:<36} {number:>14,}")
            else:
                print(f"  {name:<38} {value:>14,}")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
