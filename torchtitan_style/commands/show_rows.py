"""Rows on a terminal: what is trained on in colour, or underlined where there is none."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from torchtitan_style.data.prepare.show import ShownDocument, ShownRow

_END_OF_LINE = "⏎"
"""In front of a line's end that is part of the text."""


def print_rows(rows: Iterable[ShownRow]) -> None:
    """Print ``rows`` to standard output. Without a terminal, a line of ~ is below what is trained on."""
    console = Console(highlight=False, soft_wrap=True)
    style = "green" if console.color_system and "NO_COLOR" not in os.environ else "underline"
    for number, row in enumerate(rows, start=1):
        share = row.trained / row.positions
        console.print(f"row {number}: {row.positions} positions, {share:.1%} of them trained on", markup=False)
        for count, document in enumerate(row.documents, start=1):
            console.print(
                f"── document {count}: positions {document.first} … {document.last}, {document.trained} trained on",
                markup=False,
                style="dim",
            )
            if console.is_terminal:
                console.print(_styled(document, style))
            else:
                sys.stdout.write(_underlined(document))
        if row.padding is not None:
            console.print(f"── padding: positions {row.padding} … {row.positions - 1}", markup=False, style="dim")
        console.print()


def _styled(document: ShownDocument, style: str) -> Text:
    text = Text()
    for stretch in document.stretches:
        text.append(_visible(stretch.text), style if stretch.trained else "")
    return text


def _underlined(document: ShownDocument) -> str:
    """Lines of text, and below each a line that marks what is trained on."""
    lines: list[list[tuple[str, bool]]] = [[]]
    for stretch in document.stretches:
        for character in _visible(stretch.text):
            if character == "\n":
                lines.append([])
            else:
                lines[-1].append((character, stretch.trained))
    found = ""
    for line in lines:
        marks = "".join("~" if trained else " " for _, trained in line).rstrip()
        found += "".join(character for character, _ in line) + "\n" + (marks + "\n" if marks else "")
    return found


def _visible(text: str) -> str:
    """``text`` with its line ends and control characters to be seen."""
    return "".join(
        f"{_END_OF_LINE}\n" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in text
    )
