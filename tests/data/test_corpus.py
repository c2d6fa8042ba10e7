"""Which files a corpus is made of, and what is wrong with one that cannot be used."""

from __future__ import annotations

import glob
import gzip
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchtitan_style.common.errors import UserError
from torchtitan_style.config.schema import Corpus
from torchtitan_style.data.sources.corpus import source_files
from torchtitan_style.data.sources.documents import read_records
from torchtitan_style.data.sources.wildcards import expand


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def write(path: str, content: str | bytes = "text") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def names(*paths: str, root: Path | None = None) -> list[str]:
    base = (root or Path.cwd()).resolve()
    files = source_files(Corpus(dataset="files", paths=list(paths)))
    return [Path(file.url).relative_to(base).as_posix() for file in files]


def test_patterns_are_read_in_their_order_and_matches_sorted() -> None:
    for name in ("z", "b", "a", "c"):
        write(f"{name}.txt")
        write(f"{name}.md")
    assert names("c.md", "*.txt", "a.md") == ["c.md", "a.txt", "b.txt", "c.txt", "z.txt", "a.md"]


def test_two_stars_match_any_depth() -> None:
    for path in ("top.txt", "x/one.txt", "x/y/z/deep.txt", "x/other.md"):
        write(path)
    assert names("**/*.txt") == ["top.txt", "x/one.txt", "x/y/z/deep.txt"]
    assert names("x/**") == ["x/one.txt", "x/other.md", "x/y/z/deep.txt"]  # folders among the matches are no files


def test_a_file_that_is_named_in_several_ways_is_there_once(folder: Path) -> None:
    for path in ("a.txt", "b.txt", "x/c.md"):
        write(path)
    assert names("b.txt", "*.txt", "./a.txt", "b.txt", f"{folder}/a.txt", "x/../a.txt") == ["b.txt", "a.txt"]


def test_a_name_with_wildcard_characters_and_one_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    write("home/h.txt")
    write("a[1].txt")
    assert names("a[1].txt", "~/h.txt") == ["a[1].txt", "home/h.txt"]


def test_a_name_that_exists_as_it_is_written_is_read() -> None:
    for path in ("part[1].txt", "part1.txt", "set[1]/a.txt", "set1/b.txt", "sets1/c.txt"):
        write(path)
    assert names("part[1].txt") == ["part[1].txt"]
    assert names("set[1]/*.txt") == names("set[1]/**") == ["set[1]/a.txt"]
    assert names("part[12].txt") == ["part1.txt"]
    assert names("set[2-9s]1/*.txt") == ["sets1/c.txt"]


@pytest.mark.timeout(20)
def test_links_to_a_folder_above_are_followed_once() -> None:
    write("x/1.txt")
    write("x/y/2.txt")
    for link in ("a", "b"):
        os.symlink(".", f"x/{link}")
    os.symlink("..", "x/y/up")
    os.symlink("y", "x/other")
    assert sorted(names("x/**/*.txt")) == sorted(names("**")) == ["x/1.txt", "x/y/2.txt"]


PATTERNS = [
    "**",
    "**/*.txt",
    "x/**",
    "x/**/*",
    "*/*",
    "[xy]/?.*",
    "**/y/**/*.md",
    "./x/*",
    "x/../*.txt",
    ".*/*",
    "**/.*",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_such_names_and_links_the_matches_are_those_of_glob(pattern: str) -> None:
    for path in ("top.txt", "x/1.txt", "x/a.md", "x/y/2.txt", "x-/3.txt", "x/y/z.md", "y/.h.txt", ".h/4.txt", "x.txt"):
        write(path)
    expected = [path for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(path)]
    assert expand(pattern) == list(dict.fromkeys(expected))


KINDS = {
    "a.jsonl": ("jsonl", ""),
    "a.json": ("jsonl", ""),
    "a.ndjson": ("jsonl", ""),
    "A.JSONL.GZ": ("jsonl", ".gz"),
    "a.b.jsonl.zst": ("jsonl", ".zst"),
    "a.json.xz": ("jsonl", ".xz"),
    "a.txt.bz2": ("text", ".bz2"),
    "a.parquet": ("parquet", ""),
    "a.md": ("text", ""),
    "README": ("text", ""),
    ".gz": ("text", ""),
    "jsonl": ("text", ""),
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_a_name_says_what_a_file_is(name: str, kind: tuple[str, str]) -> None:
    write(name, "x" * 77)
    [file] = source_files(Corpus(dataset="files", paths=[name]))
    assert (file.format, file.compression) == kind
    assert (file.url, file.size, file.is_remote) == (str(Path(name).resolve()), 77, False)


def test_a_version_changes_with_the_file() -> None:
    write("a.txt")
    corpus = Corpus(dataset="files", paths=["a.txt"])
    before = source_files(corpus)
    assert source_files(corpus) == before
    os.utime("a.txt", ns=(0, 12345))
    assert source_files(corpus)[0].version != before[0].version


def test_the_standard_library_is_the_default_and_always_the_same() -> None:
    files = source_files(Corpus())
    assert files == source_files(Corpus())
    root = Path(sysconfig.get_path("stdlib")).resolve()
    inside = [path for file in files if (path := Path(file.url)).is_relative_to(root)]
    assert len(inside) >= len(files) - 1  # Debian links one into /etc
    relative = [path.relative_to(root).as_posix() for path in inside]
    assert relative == sorted(relative)
    assert {"abc.py", "json/decoder.py", "collections/__init__.py"} <= set(relative)
    parts = {part for name in relative for part in name.split("/")}
    assert not parts & {"test", "tests", "site-packages", "encodings"}
    assert {file.format for file in files} == {"source"}


ERRORS: dict[str, tuple[Callable[[], object], list[str], list[str]]] = {
    "missing file": (lambda: None, ["a.txt"], ["data.paths: ", 'no file matches "a.txt"', "looked in /"]),
    "pattern without match": (lambda: write("a.md"), ["*.txt"], ["data.paths: ", '"*.txt"']),
    "folder": (lambda: write("a/b.txt"), ["a"], ["data.paths: ", '"a" (a folder; add /**/*.txt']),
    "several": (lambda: write("b.txt"), ["a.txt", "b.txt", "c.txt"], ['no file matches "a.txt", "c.txt" (looked']),
    "unknown protocol": (lambda: None, ["gopher://a/b.txt"], ["data.paths: gopher://a/b.txt: ", "gopher"]),
    "no match of a URL": (lambda: None, ["memory://x/*.jsonl"], ['data.paths: no file matches "memory://x/*.jsonl"']),
    "no such URL": (lambda: None, ["memory://x/a.jsonl"], ["data.paths: there is no memory://x/a.jsonl"]),
}


@pytest.mark.parametrize(("make", "paths", "parts"), ERRORS.values(), ids=ERRORS)
def test_what_is_wrong_with_paths(make: Callable[[], object], paths: list[str], parts: list[str]) -> None:
    make()
    with pytest.raises(UserError) as caught:
        names(*paths)
    for part in parts:
        assert part in str(caught.value)


def test_wildcards_in_a_url() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        memory.pipe(f"/corpus/{name}", b'{"text": "' + name.encode() + b'"}\n')
    files = source_files(Corpus(dataset="files", paths=["memory://corpus/*.jsonl"]))
    assert [file.url for file in files] == ["memory:///corpus/a.jsonl", "memory:///corpus/b.jsonl"]
    assert all(file.is_remote and file.size and file.format == "jsonl" for file in files)
    texts = [record.text for file in files for record in read_records(file, text_key="text", max_bytes=100)]
    assert texts == ["a.jsonl", "b.jsonl"]
    memory.rm("/corpus", recursive=True)


README = """\
---
configs:
- config_name: small
  data_files:
  - split: train
    path: small/*.parquet
  - split: test
    path: held/*.parquet
- config_name: lines
  data_files: "lines/*.jsonl.gz"
---
# A corpus
"""


@pytest.fixture
def hub_folder() -> str:
    """A dataset as the Hub has them."""
    for name in ("small/1.parquet", "small/0.parquet", "held/0.parquet"):
        Path("corpus", name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": [name]}), Path("corpus", name))
    write("corpus/lines/a.jsonl.gz", gzip.compress(b'{"text": "a"}\n'))
    write("corpus/README.md", README)
    return str(Path("corpus").absolute())


def relative(corpus: Corpus) -> list[str]:
    return [Path(file.url).relative_to(Path(corpus.dataset).resolve()).as_posix() for file in source_files(corpus)]


def test_subsets_and_splits_of_a_dataset(hub_folder: str) -> None:
    assert relative(Corpus(dataset=hub_folder, subset="small")) == ["small/0.parquet", "small/1.parquet"]
    assert relative(Corpus(dataset=hub_folder, subset="small", split="test")) == ["held/0.parquet"]
    lines = Corpus(dataset=hub_folder, subset="lines")
    assert relative(lines) == ["lines/a.jsonl.gz"]
    assert (source_files(lines)[0].format, source_files(lines)[0].compression) == ("jsonl", ".gz")


def test_a_dataset_without_a_readme_is_known_by_its_file_names() -> None:
    for name in ("train-00001.parquet", "train-00000.parquet", "validation-00000.parquet"):
        Path("corpus/data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": [name]}), Path("corpus/data", name))
    dataset = str(Path("corpus").absolute())
    assert relative(Corpus(dataset=dataset)) == ["data/train-00000.parquet", "data/train-00001.parquet"]
    assert relative(Corpus(dataset=dataset, split="validation")) == ["data/validation-00000.parquet"]


@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz"])
def test_a_dataset_of_text(name: str) -> None:
    write(f"corpus/{name}", gzip.compress(b"text") if name.endswith("gz") else b"text")
    assert relative(Corpus(dataset=str(Path("corpus").absolute()))) == [name]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"subset": "smal"}, ["data.dataset: ", "smal", "small", "lines"]),
        ({}, ["data.dataset: ", "small", "lines"]),  # which one?
        ({"subset": "small", "split": "dev"}, ["data.split: ", 'no split "dev"; it has train, test']),
    ],
)
def test_an_unknown_subset_or_split(hub_folder: str, options: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        source_files(Corpus(dataset=hub_folder, **options))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dataset_that_is_not_there_or_not_of_text(folder: Path) -> None:
    with pytest.raises(UserError, match=r'data\.dataset: "nobody/nothing": '):
        source_files(Corpus(dataset="nobody/nothing"))
    with pytest.raises(UserError, match=r"data\.dataset: "):
        source_files(Corpus(dataset=str(folder / "missing")))
    write("corpus/train.csv", "text\na\n")
    with pytest.raises(UserError, match=r"is made of \.csv files; what can be read is parquet, JSON lines and text"):
        source_files(Corpus(dataset=str(folder / "corpus")))
