"""Documents from files: which ones, in which order, and what is wrong with a file that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchtitan_style.config.schema import Data
from torchtitan_style.data.corpus import read_documents
from torchtitan_style.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*paths: str, text_key: str = "text") -> list[str]:
    return list(read_documents(Data(dataset="files", paths=list(paths), text_key=text_key)))


def write(path: str, content: str | bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def test_any_file_is_a_document() -> None:
    write("notes.md", "first line\n\nlast line, 日本語 🙂\n")
    assert read("notes.md") == ["first line\n\nlast line, 日本語 🙂\n"]


def test_lines_of_jsonl_are_documents() -> None:
    texts = ["one", "two\nlines", "日本語 🙂"]
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    write("a.jsonl", "\n\n".join(lines))  # blank lines between, none at the end
    assert read("a.jsonl") == texts


def test_rows_of_parquet_are_documents() -> None:
    texts = [f"text {i}" for i in range(3000)]  # more than are read at once
    pq.write_table(pa.table({"id": range(3000), "text": texts}), "a.parquet", row_group_size=700)
    assert read("a.parquet") == texts


def test_the_field_with_the_text_can_be_named() -> None:
    write("a.jsonl", json.dumps({"text": "no", "body": "yes"}))
    pq.write_table(pa.table({"text": ["no"], "body": ["yes"]}), "a.parquet")
    assert read("a.jsonl", "a.parquet", text_key="body") == ["yes", "yes"]


def test_empty_documents_are_left_out() -> None:
    write("a.txt", "")
    write("b.jsonl", '{"text": ""}\n{"text": "b"}\n')
    pq.write_table(pa.table({"text": ["", None, "c"]}), "c.parquet")
    assert read("a.txt", "b.jsonl", "c.parquet") == ["b", "c"]


def test_patterns_are_read_in_their_order_and_matches_sorted() -> None:
    for name in ("z", "b", "a", "c"):
        write(f"{name}.txt", name)
        write(f"{name}.md", name.upper())
    assert read("c.md", "*.txt", "a.md") == ["C", "a", "b", "c", "z", "A"]


def test_two_stars_match_any_depth() -> None:
    for path in ("top.txt", "x/one.txt", "x/y/z/deep.txt", "x/other.md"):
        write(path, path)
    assert read("**/*.txt") == ["top.txt", "x/one.txt", "x/y/z/deep.txt"]
    assert read("x/**") == ["x/one.txt", "x/other.md", "x/y/z/deep.txt"]  # folders among the matches are no files


def test_a_file_that_several_patterns_match_is_read_once() -> None:
    write("a.txt", "a")
    write("b.txt", "b")
    assert read("b.txt", "*.txt", "./a.txt", "b.txt") == ["b", "a"]


def test_a_file_that_is_named_in_two_ways_is_read_once(folder: Path) -> None:
    write("a.txt", "a")
    (folder / "x").mkdir()
    assert read("a.txt", f"{folder}/a.txt", "x/../a.txt") == ["a"]


def test_a_name_with_wildcard_characters_and_one_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    write("home/h.txt", "h")
    write("a[1].txt", "a")
    assert read("a[1].txt", "~/h.txt") == ["a", "h"]


def test_standard_library_is_the_default_and_always_the_same() -> None:
    import abc

    first, again = (list(islice(read_documents(Data()), 40)) for _ in range(2))
    assert first == again
    assert Path(abc.__file__).read_text(encoding="utf-8") in first


def truncated_parquet() -> None:
    pq.write_table(pa.table({"text": ["text"] * 100}), "a.parquet")
    whole = Path("a.parquet").read_bytes()
    write("a.parquet", whole[: len(whole) // 2])


ERRORS: dict[str, tuple[Callable[[], object], str, list[str]]] = {
    "missing file": (lambda: None, "a.txt", ["data.paths: ", 'no file matches "a.txt"', "looked in /"]),
    "pattern without match": (lambda: write("a.md", "a"), "*.txt", ["data.paths: ", '"*.txt"']),
    "folder": (lambda: write("a/b.txt", "b"), "a", ["data.paths: ", '"a" (a folder; add /**/*.txt']),
    "not UTF-8": (lambda: write("a.txt", b"caf\xe9"), "a.txt", ["data.paths: a.txt: ", "UTF-8"]),
    "jsonl not UTF-8": (lambda: write("a.jsonl", b'{"text": "\xe9"}'), "a.jsonl", ["data.paths: a.jsonl: ", "UTF-8"]),
    "not JSON": (
        lambda: write("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n'),
        "a.jsonl",
        ["data.paths: a.jsonl, line 3: not JSON"],
    ),
    "half a surrogate pair": (  # JSON can spell what is no Unicode text, and no tokenizer takes
        lambda: write("a.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}\n'),
        "a.jsonl",
        ["data.paths: a.jsonl, line 2"],
    ),
    "no such field": (
        lambda: write("a.jsonl", '{"text": "a"}\n{"txt": "b", "id": 1}\n'),
        "a.jsonl",
        ["data.text_key: a.jsonl, line 2", 'no text under "text"', "txt, id"],
    ),
    "field without text": (lambda: write("a.jsonl", '{"text": 3}'), "a.jsonl", ["data.text_key: a.jsonl, line 1"]),
    "line without fields": (lambda: write("a.jsonl", '["text"]'), "a.jsonl", ["data.text_key: a.jsonl, line 1"]),
    "no such column": (
        lambda: pq.write_table(pa.table({"txt": ["a"], "id": [1]}), "a.parquet"),
        "a.parquet",
        ["data.text_key: a.parquet: ", 'no column "text"', "txt, id"],
    ),
    "column without text": (
        lambda: pq.write_table(pa.table({"text": [1, 2]}), "a.parquet"),
        "a.parquet",
        ["data.text_key: a.parquet: ", "does not hold text"],
    ),
    "truncated parquet": (truncated_parquet, "a.parquet", ["data.paths: a.parquet: ", "parquet"]),
    "no parquet": (lambda: write("a.parquet", "text"), "a.parquet", ["data.paths: a.parquet: ", "parquet"]),
}


@pytest.mark.parametrize(("make", "path", "parts"), ERRORS.values(), ids=ERRORS)
def test_what_is_wrong_with_a_file(make: Callable[[], object], path: str, parts: list[str]) -> None:
    make()
    with pytest.raises(UserError) as caught:
        read(path)
    for part in parts:
        assert part in str(caught.value)


def test_all_missing_files_are_named_at_once() -> None:
    write("b.txt", "b")
    with pytest.raises(UserError, match=r'"a\.txt", "c\.txt"'):
        read("a.txt", "b.txt", "c.txt")
