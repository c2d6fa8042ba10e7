"""docs/learn: the snippets of its pages run and give what the pages say, and what they point to exists."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, ROOT
from tests.docs.snippets import snippets

LEARN = ROOT / "docs" / "learn"
PAGES = sorted(path for path in LEARN.glob("*.md") if path.name != "index.md")
TWO_RANKS = LEARN / "tensor_parallel.py"


@pytest.fixture(scope="module")
def problems(python, tmp_path_factory) -> dict[str, str]:
    """What went wrong on each page. One process runs them all."""
    into = tmp_path_factory.mktemp("snippets") / "problems.json"
    done = python(ROOT / "tests/docs/snippets.py", "--json", into, *PAGES, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return json.loads(into.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(problems: dict[str, str], page: Path) -> None:
    assert snippets(page)
    if problem := problems[str(page)]:
        pytest.fail(problem, pytrace=False)


def test_two_ranks(run_ranks) -> None:
    run_ranks(TWO_RANKS, 2)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_page_has_its_parts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for heading in ("The problem", "In this package", "Try it", "Source"):
        assert f"\n## {heading}\n" in text, heading
    assert page.name in (LEARN / "index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_points_to_exists(page: Path) -> None:
    section = page.read_text(encoding="utf-8").partition("## In this package")[2].partition("\n## ")[0]
    pointers = re.findall(r"^- `(torchtitan_style/[\w/]+\.py)`: (.*(?:\n  .*)*)", section, flags=re.M)
    assert pointers
    for file, names in pointers:
        # A list of names, and then perhaps what they are for.
        [listed] = re.findall(r"^((?:`[A-Za-z_][\w.]*`(?:,\s+)?)+)", names)
        for name in re.findall(r"`([\w.]+)`", listed):
            assert name in names_in(ROOT / file), f"{file} has no {name}"


def names_in(file: Path) -> set[str]:
    """Functions and classes of a module, and "Class.name" for what is defined in a class."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found
