"""The held-out documents of a corpus that is streamed: collected once, before the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..encode import PARTS, Recipe, is_held_out
from ..sources.corpus import SourceFile
from ..sources.documents import texts_of
from ..tokenizer.tokenizer import Tokenizer
from .changes import sample_hash, source_entry
from .tokenize import file_entry


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
    encode = recipe.encoder(tokenizer)
    counts: Counter[str] = Counter()
    with recipe.writer(place, "validation", 0, tokenizer.end_of_text) as shard:
        for text in texts_of(files, fields=recipe.fields, max_bytes=recipe.max_document_bytes):
            if is_held_out(text, recipe.validation_fraction):
                (encoded,) = encode([text])
                if encoded.samples:
                    shard.add(encoded.samples)
                    counts.update(encoded.counts)
                if shard.tokens > wanted:
                    break
        else:
            entry["exhausted"] = True
    entry["documents"]["validation"] = shard.documents
    entry["tokens"]["validation"] = shard.tokens
    entry["counts"] = counts
    entry["files"] = {file.name: file_entry(file) for file in sorted(place.glob("validation-00000.*"))}
    return entry
