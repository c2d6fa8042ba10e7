"""What is known of a corpus of conversations, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from .problems import counted


def sum_of_counts(units: Iterable[dict[str, Any]]) -> dict[str, int]:
    """The counts of all units: see ``encode.COUNTS``."""
    total: Counter[str] = Counter()
    for unit in units:
        total.update(unit["counts"])
    return dict(total)


def describe_chat(name: str, entry: dict[str, Any]) -> str:
    """A corpus by its ``entry`` of the manifest, in a line; "" if it is none of conversations, or has none."""
    counts, tokens = entry.get("counts"), sum(entry["tokens"].values())
    if not counts:
        return ""
    of = f" of {name}" if name else ""
    return (
        f"{counted(sum(entry['documents'].values()), 'conversation')}{of}, {counted(counts['turns'], 'turn')} of the "
        f"assistant, {counted(tokens, 'token')}, {counts['trained'] / tokens:.1%} of them trained on"
    )


def report_chat(name: str, entry: dict[str, Any]) -> Iterator[str]:
    """Lines about a corpus of conversations that was prepared; none if it is one of texts."""
    if not (line := describe_chat(name, entry)):
        return
    yield line
    counts, tokens, of = entry["counts"], sum(entry["tokens"].values()), f" of {name}" if name else ""
    if counts["split"]:
        yield (
            f"{counted(counts['split'], 'conversation')}{of} became several samples, because the chat template renders "
            f"earlier turns differently later on: {counts['samples']:,} samples in all, {counts['added']:,} more "
            f"tokens (+{counts['added'] / (tokens - counts['added'] or 1):.1%})"
        )
    if counts["cut"]:
        yield f"{counted(counts['cut'], 'sample')}{of} cut at the end of a row (training.seq_len)"
