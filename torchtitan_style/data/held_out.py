"""The held-out documents of a corpus that is streamed: collected once, before the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .changes import sample_hash, source_entry
from .corpus import SourceFile
from .packing import text_lengths
from .texts import texts_of
from .tokenize import PARTS, Recipe, file_entry, is_held_out
from .tokenizer import Tokenizer


def hold_out(
    files: list[SourceFile], place: Path, recipe: Recipe, wanted: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write the first held-out documents of a streamed corpus into ``place``, until there are ``wanted`` tokens.

    Returns the corpus's entry of the manifest.
    """
    entry: dict[str, Any] = {
        "documents": dict.fromkeys(PARTS, 0),
        "tokens": dict.fromkeys(PARTS, 0),
        "sources": [source_entry(file, "" if file.is_remote else sample_hash(Path(file.url))) for file in files],
        "files": {},
        "exhausted": False,
    }
    if not wanted:
        return entry
    say("collecting held-out documents from the beginning of the stream")
    tokenizer = Tokenizer(Path(recipe.tokenizer))
    lengths, count, total = list[int](), 0, 0
    path = place / "validation-00000.bin"
    with path.open("wb") as shard:
        shard.write(np.array([tokenizer.end_of_text], dtype=recipe.dtype).tobytes())
        for text in texts_of(files, text_key=recipe.text_key, max_bytes=recipe.max_document_bytes):
            if is_held_out(text, recipe.validation_fraction):
                ids = np.array([*tokenizer.encode(text), tokenizer.end_of_text], dtype=recipe.dtype)
                shard.write(ids.tobytes())
                lengths += text_lengths(ids, tokenizer.end_of_text)
                count, total = count + 1, total + len(ids)
                if total >= wanted:
                    break
        else:
            entry["exhausted"] = True
    path.with_suffix(".index").write_bytes(np.array(lengths, dtype="<u4").tobytes())
    entry["documents"]["validation"] = count
    entry["tokens"]["validation"] = total + 1
    entry["files"] = {file.name: file_entry(file) for file in (path, path.with_suffix(".index"))}
    return entry
