"""Documents that could not be read: listed in ``data_errors.jsonl``, and counted up to a limit.

{"file": "corpus.jsonl", "line": 17, "problem": "not JSON: …"} — "line" from 1 in JSON lines, "row" from 0 in
parquet, "byte" from 0 in text. Empty documents do no harm: they are not counted, and the first thousand are listed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchtitan_style.common.errors import UserError

from .corpus import SourceFile
from .documents import EMPTY, PLACE_NAMES, Record

__all__ = ["FILE_NAME", "BadDocuments", "Problem", "TooManyBadDocuments", "describe", "problem_of"]

FILE_NAME = "data_errors.jsonl"
_EMPTY_LISTED = 1000
"""Empty documents that are listed at most: a large corpus may have very many."""

Problem = dict[str, Any]
"""A line of the list: file, place and problem."""


def problem_of(file: SourceFile, record: Record) -> Problem:
    """The line about a record that has a problem."""
    return {"file": file.url, PLACE_NAMES[file.format]: record.place, "problem": record.problem}


class TooManyBadDocuments(UserError):
    """More documents cannot be read than data.max_bad_documents allows."""


class BadDocuments:
    """The list of one run or prepared corpus. Each document is in it once, however often it is met."""

    def __init__(self, path: Path, *, limit: int) -> None:
        self.path, self.limit = path, limit
        self.count = 0
        self._empty = 0
        self._listed: set[str] = set()
        self._first: list[Problem] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self._note(json.loads(line))
                except ValueError:
                    continue  # cut short by a kill

    def add(self, problems: Iterable[Problem]) -> None:
        """List ``problems``. Raises TooManyBadDocuments when there are more than the limit."""
        new = [problem for problem in problems if self._note(problem)]
        if new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(problem) + "\n" for problem in new))
        if self.count > self.limit:
            shown = "\n".join(f"  {describe(problem)}" for problem in self._first)
            raise TooManyBadDocuments(
                f"{self.count:,} documents cannot be read, and data.max_bad_documents is {self.limit}:\n{shown}\n"
                f"All are listed in {self.path}. Mend them, or raise data.max_bad_documents to leave them out"
            )

    def _note(self, problem: Problem) -> bool:
        """Remember ``problem``. Whether it is new."""
        key = json.dumps({name: value for name, value in problem.items() if name != "problem"}, sort_keys=True)
        is_empty = problem["problem"] == EMPTY
        if key in self._listed or (is_empty and self._empty == _EMPTY_LISTED):
            return False
        self._listed.add(key)
        self._empty += is_empty
        self.count += not is_empty
        if not is_empty and len(self._first) < 5:
            self._first.append(problem)
        return True


def describe(problem: Problem) -> str:
    """``problem`` in a line for a person."""
    place = next(f"{name} {problem[name]}" for name in PLACE_NAMES.values() if name in problem)
    return f"{problem['file']}, {place}: {problem['problem']}"
