"""The figures of an evaluation, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .figures import Document, Sums

_HEADINGS = ("file", "documents", "tokens", "bytes", "loss", "± s.e.", "perplexity", "bits/byte", "accuracy")
_LONGEST_NAME = 40


def table(rows: Iterable[tuple[str, Sums]]) -> list[str]:
    """Lines with aligned columns, a row for each name."""
    cells = [_HEADINGS, *(_cells(name, sums) for name, sums in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            f"{cell:>{width}}" if i else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def _cells(name: str, sums: Sums) -> tuple[str, ...]:
    name = name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]
    figures = sums.figures()

    def show(key: str, form: str) -> str:
        return "-" if figures[key] is None else format(figures[key], form)

    return (
        name,
        *(show(key, ",") for key in ("documents", "tokens", "bytes")),
        show("loss", ".4f"),
        show("loss_standard_error", ".4f"),
        show("perplexity", ",.2f"),
        show("bits_per_byte", ".4f"),
        show("accuracy", ".1%"),
    )


def document_line(file: str, document: Document) -> dict[str, Any]:
    """A document as --per-document writes it."""
    return {
        "file": file,
        "document": document.index,
        "place": document.place,
        "tokens": document.tokens,
        "bytes": document.bytes,
        **document.figures(),
    }
