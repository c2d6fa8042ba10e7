"""Documents that could not be read: listed in ``data_errors.jsonl``, and counted up to a limit.

{"file": "corpus.jsonl", "line": 17, "problem": "not JSON: …"} — "line" from 1 in JSON lines, "item" from 1 in a JSON
array, "row" from 0 in parquet, "byte" from 0 in text. Empty documents do no harm: they are not counted, and the first
thousand are listed. A file that is lost, all or from some point on, has "lost_bytes" and "lost_rows" too (null: not
known). It is not counted among the documents, but must be allowed by its name.
"""

from __future__ import annotations

import fnmatch
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torchtitan_style.common.errors import UserError, cut
from torchtitan_style.common.reading import json_lines
from torchtitan_style.common.typed import Content, Count, typed

from .corpus import SourceFile
from .records import EMPTY, PLACE_NAMES, Record

FILE_NAME = "data_errors.jsonl"
KEPT = "kept: "
"""How the problem of a document begins that is no bad one."""
_HARMLESS_LISTED = 1000
"""Documents that do no harm and are listed at most: a large corpus may have very many."""

Problem = dict[str, Any]
"""A line of the list: file, place and problem."""


def problem_of(file: SourceFile, record: Record) -> Problem:
    """The line about a record that has a problem."""
    problem = {"file": file.url, record.place_name or PLACE_NAMES[file.format]: record.place, "problem": record.problem}
    return problem | ({"lost_rows": record.lost.rows, "lost_bytes": record.lost.bytes or None} if record.lost else {})


def is_lost(problem: Problem) -> bool:
    """Whether all or the rest of a file is lost with ``problem``."""
    return "lost_bytes" in problem


def is_bad_document(problem: Problem) -> bool:
    """Whether ``problem`` counts for data.max_bad_documents."""
    return not is_lost(problem) and not is_harmless(problem)


def is_harmless(problem: Problem) -> bool:
    """Whether the document of ``problem`` is empty, or trained on."""
    return bool(problem["problem"] == EMPTY or problem["problem"].startswith(KEPT))


def is_allowed(url: str, allowed: Sequence[str]) -> bool:
    """Whether data.allow_lost_files has a name or pattern for this file."""
    return any(url == name or fnmatch.fnmatchcase(url, name) or url.endswith(f"/{name}") for name in allowed)


def counted(count: int, noun: str) -> str:
    """ "1 document", "1,000 documents"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def describe_loss(lost: Sequence[Problem]) -> str:
    """How much is lost with these files, as far as it is known: "2 files (20,000 rows, 1,234 bytes)"."""
    amounts = []
    for field in ("row", "byte"):
        total = sum(problem[f"lost_{field}s"] or 0 for problem in lost)
        known = all(problem[f"lost_{field}s"] is not None for problem in lost)
        amounts += [("" if known else "at least ") + counted(total, field)] if total else []
    files = counted(len({problem["file"] for problem in lost}), "file")
    return files + (f" ({', '.join(amounts)})" if amounts else "")


def describe_left_out(documents: int, lost: Sequence[Problem]) -> str:
    """What a warning says of bad documents and lost files."""
    parts = [counted(documents, "document")] * bool(documents) + [describe_loss(lost)] * bool(lost)
    return f"{' and '.join(parts)} cannot be read and {'is' if documents + len(lost) == 1 else 'are'} left out"


class TooManyBadDocuments(UserError):
    """More documents cannot be read than data.max_bad_documents allows."""


class LostFiles(TooManyBadDocuments):
    """Files are lost, all or from some point on, that data.allow_lost_files does not name."""


def lost_files(lost: Sequence[Problem], allowed: Sequence[str], listed: str = "") -> LostFiles:
    """The error about ``lost``. allowed: data.allow_lost_files. listed: a line that says where all are listed."""
    names = list(dict.fromkeys([*allowed, *(problem["file"] for problem in lost)]))
    more = "  …\n" if len(lost) > 5 else ""
    return LostFiles(
        f"data: {describe_loss(lost)} cannot be read, all or from some point on:{first_few(lost)}\n{more}{listed}"
        "Repair them or name other files. To train without what is lost, allow it by name:\n"
        f"  --data.allow_lost_files {' '.join(shlex.quote(name) for name in names)}\n"
        f"or in the configuration, under [data]:\n  allow_lost_files = {json.dumps(names, ensure_ascii=False)}"
    )


class _Listed(Content):
    """A line of the list. Which place it has depends on the format of the file."""

    file: str
    problem: str
    line: Count | None = None
    row: Count | None = None
    byte: Count | None = None
    item: Count | None = None
    document: Count | None = None
    lost_rows: Count | None = None
    lost_bytes: Count | None = None


def _is_problem(value: Any) -> bool:
    try:
        typed(_Listed, value)
    except ValueError:
        return False
    return ("lost_rows" in value) == ("lost_bytes" in value)


class BadDocuments:
    """The list of one run or prepared corpus. Each document is in it once, however often it is met."""

    def __init__(self, path: Path, *, limit: int, allow_lost: Sequence[str] = ()) -> None:
        self.path, self.limit, self.allow_lost = path, limit, allow_lost
        self.count = 0
        self.lost: list[Problem] = []
        self._harmless = 0
        self._listed: set[str] = set()
        self._first: list[Problem] = []
        if not path.exists():
            return
        try:
            for _, problem in json_lines(path):
                if _is_problem(problem):  # else it was cut short by a kill
                    self._note(problem)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None

    def add(self, problems: Iterable[Problem]) -> None:
        """List ``problems``. Raises TooManyBadDocuments when there are more than the limit, and LostFiles when some
        are of files that may not be lost."""
        new = [problem for problem in problems if self._note(problem)]
        if new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(problem) + "\n" for problem in new))
        if lost := [each for each in new if is_lost(each) and not is_allowed(each["file"], self.allow_lost)]:
            raise lost_files(lost, self.allow_lost, f"All are listed in {self.path}.\n")
        if self.count > self.limit:
            raise TooManyBadDocuments(
                f"{counted(self.count, 'document')} cannot be read, and data.max_bad_documents is {self.limit}:"
                f"{first_few(self._first)}\n"
                f"All are listed in {self.path}. Repair them, or raise data.max_bad_documents to leave them out"
            )

    def _note(self, problem: Problem) -> bool:
        """Remember ``problem``. Whether it is new."""
        key = json.dumps([problem["file"], _place(problem), is_lost(problem)])
        harmless = is_harmless(problem)
        if key in self._listed or (harmless and self._harmless == _HARMLESS_LISTED):
            return False
        self._listed.add(key)
        self._harmless += harmless
        self.count += is_bad_document(problem)
        self.lost += [problem] if is_lost(problem) else []
        if is_bad_document(problem) and len(self._first) < 5:
            self._first.append(problem)
        return True


def first_few(problems: Sequence[Problem]) -> str:
    """The first five, each on a line of its own, below what an error says about all."""
    return "".join(f"\n  {_describe(problem)}" for problem in problems[:5])


def _describe(problem: Problem) -> str:
    """``problem`` in a line for a person."""
    return f"{problem['file']}, {_place(problem)}: {cut(problem['problem'], 300)}"


def _place(problem: Problem) -> str:
    return next((f"{name} {problem[name]}" for name in (*PLACE_NAMES.values(), "item") if name in problem), "")
