"""Preparing conversations: ``prepare`` against ``datasets.map`` with ``apply_chat_template``, on the same processes.

    python benchmarks/chat.py [--tokenizer DIR] [--conversations 10000] [--processes 2]

Ours makes the masks too, and the samples that a conversation is split into where the template wants it; `datasets.map`
makes token ids of the whole conversation. Both start new processes, and are timed with them. Without --tokenizer one
is trained on the spot, with ChatML.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    "what",
    "is",
    "the",
    "loss",
    "of",
    "a",
    "model",
    "gradient",
    "token",
    "mesh",
    "shard",
    "rank",
    "weight",
    "step",
    "how",
    "much",
    "should",
    "we",
    "train",
    "longer",
    "because",
    "it",
]

MAP = """
import sys, datasets, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[2])
def encode(row):
    return {"ids": tokenizer.apply_chat_template(row["messages"])["input_ids"]}
rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[3])
done = rows.map(encode, num_proc=int(sys.argv[4]), remove_columns=rows.column_names, load_from_cache_file=False)
print(sum(len(ids) for ids in done["ids"]))
"""


def write_conversations(path: Path, count: int) -> None:
    draw = random.Random(0)

    def say(role: str, longest: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(5, longest)))}

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            turns = range(draw.randint(1, 4))
            messages = [message for _ in turns for message in (say("user", 40), say("assistant", 120))]
            file.write(json.dumps({"messages": messages}) + "\n")


def make_tokenizer(folder: Path, corpus: Path) -> None:
    from torchtitan_style.data.chat.template import ensure_template
    from torchtitan_style.data.tokenizer.tokenizer import train

    with corpus.open(encoding="utf-8") as file:
        texts = [message["content"] for line in file for message in json.loads(line)["messages"]]
    train(texts[:20_000], folder, vocab_size=8192)
    ensure_template(folder)


def timed(command: list[str]) -> tuple[float, str]:
    begin = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return time.perf_counter() - begin, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer")
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "conversations.jsonl"
        write_conversations(corpus, options.conversations)
        tokenizer = Path(options.tokenizer or folder / "tokenizer")
        if not options.tokenizer:
            make_tokenizer(tokenizer, corpus)
        ours = [sys.executable, "-m", "torchtitan_style", "prepare", "--processes", str(options.processes)]
        settings = {
            "model.vocab_size": "151936",
            "data.dataset": "files",
            "data.paths": str(corpus),
            "data.format": "chat",
        }
        settings |= {
            "data.tokenizer": str(tokenizer),
            "training.seq_len": "2048",
            "job.dump_folder": str(folder / "run"),
        }
        ours += [part for key, value in settings.items() for part in (f"--{key}", value)]
        theirs = [sys.executable, "-c", MAP, str(corpus), str(tokenizer), str(folder / "cache"), str(options.processes)]
        seconds: dict[str, list[float]] = {"prepare": [], "datasets.map": []}
        for _ in range(options.runs):
            for what, command in (("prepare", ours), ("datasets.map", theirs)):
                shutil.rmtree(folder / "run", ignore_errors=True)
                took, output = timed(command)
                seconds[what].append(took)
        print(output.strip().splitlines()[-1], "tokens by datasets.map")
        for what, values in seconds.items():
            median = statistics.median(values)
            print(f"{what}: {median:.1f} s, {options.conversations / median:,.0f} conversations/s")
        print(f"{statistics.median(seconds['datasets.map']) / statistics.median(seconds['prepare']):.2f} x")


if __name__ == "__main__":
    main()
