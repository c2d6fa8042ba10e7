"""Small corpora in many scripts, in every format, made on the spot."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

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
