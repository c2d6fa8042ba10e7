"""Small corpora in many scripts, in every format, made on the spot."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w

from torchtitan_style.config.schema import Data
from torchtitan_style.data.prepare.prepared import Prepared
from torchtitan_style.data.prepare.store import CorpusStore
from torchtitan_style.data.streams import StreamedCorpus

_WORDS = (
    "the of and to in is that was import def return class self None lambda yield αρχή λόγος слово начало мир 漢字 文書 "
    "東京 かな カナ 한국어 हिन्दी शब्द العربية كلمة עברית ไทย 😀 👩\u200d💻 e\u0301 ß İ 1234 3.14 → ∑ \t { } ( ) : ;"
)


def texts(count: int, *, seed: int, longest: int = 60) -> list[str]:
    """Documents of 1 … ``longest`` words, no two the same."""
    draw = random.Random(seed)
    words = _WORDS.split(" ")
    lines = (" ".join(draw.choices(words, k=draw.randint(1, longest))) for _ in range(count))
    return [f"{seed}/{number} {line}" for number, line in enumerate(lines)]


def words(count: int, *, lengths: tuple[int, int]) -> list[str]:
    """Documents of few different words, each as long as ``lengths`` say: a tiny model learns them within some steps."""
    known = ["loss", "gradient", "token", "rank", "mesh", "shard", "step", "weight", "naïve", "学习", "🙂"]
    draw = random.Random(0)
    return [" ".join(draw.choice(known) for _ in range(draw.randint(*lengths))) for _ in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    content = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(documents)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: Path, documents: list[str], *, group: int = 100) -> Path:
    pq.write_table(pa.table({"text": documents}), path, row_group_size=group)
    return path


def write_streamed_mixture(folder: Path, *, steps: int = 120) -> Path:
    """The configuration of a run on a streamed mixture, packed without cutting documents, with a document mask."""
    for number in range(4):
        write_jsonl(folder / f"{number}.jsonl", texts(120, seed=number))
    write_parquet(folder / "table.parquet", texts(400, seed=9))
    entry = {"dataset": "files"}
    settings = {
        "model": {"flavor": "debug"},
        "data": {
            "dataset": "mixture",
            "mixture": [
                {"name": "lines", "weight": 2, "paths": [str(folder / "?.jsonl")]} | entry,
                {"name": "table", "weight": 1, "paths": [str(folder / "table.parquet")]} | entry,
            ],
            "streaming": True,
            "packing": "best_fit",
            "document_mask": True,
        },
        "training": {
            "steps": steps,
            "seq_len": 64,
            "global_batch_size": 4,
            "local_batch_size": -1,
            "mixed_precision_param": "float32",
        },
        "optimizer": {"lr": 1e-4},
        "lr_scheduler": {"warmup_steps": 5, "total_steps": steps},
        "checkpoint": {"interval": 20},
        "validation": {"freq": 1000, "steps": 2},
        "generation": {"enable": False},
        "metrics": {"enable_tensorboard": False, "log_freq": 10},
    }
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(settings))
    return path


def store(data: Data, dump_folder: Path, *, vocab_size: int, **options: Any) -> CorpusStore:
    """Where the corpora of ``data`` are prepared; rows are as short as they can be, so that no corpus is too small."""
    validates = data.validation_fraction > 0
    held_out = int(validates and data.streaming)
    options |= {"vocab_size": vocab_size, "seq_len": 1, "validates": validates, "held_out_rows": held_out}
    return CorpusStore(data, dump_folder, **options)


def prepare(data: Data, dump_folder: Path, *, vocab_size: int, say: Any, **options: Any) -> Prepared:
    call = {key: options.pop(key) for key in ("progress", "processes") if key in options}
    return store(data, dump_folder, vocab_size=vocab_size, **options).get(say=say, **call)


def streamed_corpora(data: Data, prepared: Prepared, *, vocab_size: int) -> list[StreamedCorpus]:
    return store(data, prepared.folder.parent, vocab_size=vocab_size).streamed(prepared)
