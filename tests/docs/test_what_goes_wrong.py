"""docs/what_goes_wrong.md: its messages are those of the package, and every part that raises errors has some there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs/what_goes_wrong.md").read_text(encoding="utf-8")
MODULES = sorted((ROOT / "torchtitan_style").rglob("*.py"))
RAISED = ("UserError", "RunError", "Problem", "LostFiles", "TooManyBadDocuments")

# Modules whose messages say no more than that a file cannot be read, or repeat those of others.
UNLISTED = {
    "checkpoint/weights.py",
    "commands/cli.py",
    "commands/verify.py",
    "common/files.py",
    "config/help.py",
    "launch/configure.py",
    "metrics/recorder.py",
    "models/lora.py",
}


def texts(tree: ast.AST) -> list[str]:
    """All text in the source, formatted strings in one piece with … for what is filled in."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
    return [" ".join(text.split()) for text in found]


def messages() -> Iterator[list[str]]:
    """What the first column of each line quotes, in pieces between …."""
    for line in PAGE.splitlines():
        cells = re.split(r"(?<!\\)\|", line)
        if len(cells) == 5 and not re.match(r" (message|---)", cells[1]) and "(torch)" not in cells[1]:
            for quoted in re.findall(r"`([^`]+)`", cells[1]):
                yield [piece.strip() for piece in quoted.split("…") if len(piece.strip()) > 2]


SOURCE = [text for path in MODULES for text in texts(ast.parse(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("pieces", messages(), ids=" … ".join)
def test_the_package_has_this_message(pieces: list[str]) -> None:
    assert pieces
    pattern = ".*".join(map(re.escape, pieces))
    assert any(re.search(pattern, text) for text in SOURCE) or all(
        any(piece in text for text in SOURCE) for piece in pieces
    )


def test_every_part_that_raises_errors_is_covered() -> None:
    quoted = list(messages())
    uncovered = []
    for path in MODULES:
        calls = [
            call
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in RAISED and call.args
        ]
        own = [text for call in calls for text in texts(call)]
        covered = any(any(piece in text for text in own) for pieces in quoted for piece in pieces)
        if own and not covered:
            uncovered.append(path.relative_to(ROOT / "torchtitan_style").as_posix())
    assert sorted(set(uncovered) - UNLISTED) == [], "add a line for what these raise"
