"""Files that are lost as a whole, or from some point on, stop the run unless they are allowed by name."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.corpora import prepare, streamed_corpora
from torchtitan_style.common.errors import UserError
from torchtitan_style.config.schema import Corpus, Data
from torchtitan_style.data.prepare.prepared import Prepared
from torchtitan_style.data.prepare.store import CorpusStore
from torchtitan_style.data.sources import documents
from torchtitan_style.data.sources.corpus import SourceFile, source_files
from torchtitan_style.data.sources.documents import lost_file, read_records
from torchtitan_style.data.sources.problems import LostFiles
from torchtitan_style.data.sources.records import Record
from torchtitan_style.data.streams import Stream
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer
from torchtitan_style.launch.configure import load_config

GOOD = [f"good document {i}" for i in range(200)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def source(name: str, content: bytes | None = None) -> SourceFile:
    if content is not None:
        Path(name).write_bytes(content)
    [file] = source_files(Corpus(dataset="files", paths=[name]))
    return file


def read(file: SourceFile, **options: Any) -> list[Record]:
    return list(read_records(file, text_key="text", max_bytes=10**6, **options))


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def tar(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for number, text in enumerate(texts):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return sink.getvalue()


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.txt", "text")
    return sink.getvalue()


TEXT = "Some text in English, and a little more.\n" * 40
NO_TEXT: dict[str, tuple[str, bytes, str]] = {
    "tar": ("a.tar", tar([TEXT]), "a tar archive, not text; unpack it (tar -xf"),
    "tar.gz": ("a.tar.gz", gzip.compress(tar([TEXT])), "a tar archive"),
    "tar of JSON lines": ("a.jsonl.gz", gzip.compress(tar([TEXT])), "a tar archive"),
    "tgz": ("a.tgz", gzip.compress(tar([TEXT])), "gzip data"),
    "gzip without its name": ("a.txt", gzip.compress(TEXT.encode()), "gzip data, not text; add .gz to its name"),
    "zip": ("a.docx", zipped(), "a zip archive or an Office document"),
    "pdf": ("a.pdf", b"%PDF-1.7\n" + TEXT.encode(), "a PDF document"),
    "png": ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "a PNG image"),
    "UTF-16": ("a.txt", TEXT.encode("utf-16"), "UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 "),
    "UTF-16 without a mark": ("a.txt", TEXT.encode("utf-16-le"), "UTF-16LE text"),
    "UTF-16 lines": ("a.jsonl", lines(GOOD).decode().encode("utf-16-be"), "UTF-16BE text"),
    "UTF-32": ("a.txt", TEXT.encode("utf-32"), "UTF-32 text"),
    "UTF-32 without a mark": ("a.txt", TEXT.encode("utf-32-be"), "UTF-32BE text"),
    "bytes": ("a.bin", bytes(range(256)) * 50, "binary data, not text"),
}


@pytest.mark.parametrize(("name", "content", "problem"), NO_TEXT.values(), ids=NO_TEXT)
def test_what_is_no_text_is_lost_and_named(name: str, content: bytes, problem: str) -> None:
    file = source(name, content)
    [record] = read(file)
    assert problem in record.problem
    assert record.lost is not None
    assert record.lost.bytes == len(content)
    assert lost_file(file, "text") == record


def test_a_nul_in_a_text_is_a_bad_document_but_not_in_a_json_string() -> None:
    file = source("a.txt", TEXT.encode() * 5 + b"\0\n" + TEXT.encode())
    assert lost_file(file, "text") is None
    [record] = read(file)
    assert (record.lost, record.text) == (None, "")
    assert "NUL" in record.problem
    assert [r.text for r in read(source("a.jsonl", lines(["a\0b"])))] == ["a\0b"]


def test_columns_of_bytes_are_text_if_they_are_utf8() -> None:
    pq.write_table(pa.table({"text": pa.array(["日本".encode(), b"caf\xe9"], pa.binary())}), "a.parquet")
    good, bad = read(source("a.parquet"))
    assert (good.text, bad.text, bad.lost) == ("日本", "", None)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("piece", [7, 2**20])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_json_array_is_read_element_by_element(
    indent: int | None, piece: int, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE", piece)
    texts = [f'{i} [{{,"\\ 日本🙂\n' for i in range(50)]
    rows = [{"id": [{}], "text": text} for text in texts]
    rows[20] = {"id": [], "txt": "b"}
    content = json.dumps(rows, ensure_ascii=False, indent=indent).encode()
    records = read(source(f"a.json{ending}", gzip.compress(content) if ending else content))
    assert [r.text for r in records] == [*texts[:20], "", *texts[21:]]
    assert [(r.index, r.place, r.place_name) for r in records] == [(i, i + 1, "item") for i in range(50)]
    file = source(f"a.json{ending}")
    assert [r.text for r in read(file, start=30, share=(1, 2))] == texts[31::2]


def test_pretty_printed_objects_are_read() -> None:
    content = "\n".join(json.dumps({"text": text}, indent=2) for text in GOOD)
    assert [r.text for r in read(source("a.json", content.encode()))] == GOOD


@pytest.mark.parametrize("damage", [b'{"text": "no end', b"", b"] more"])
def test_what_is_behind_a_damaged_element_is_lost(damage: bytes) -> None:
    content = json.dumps([{"text": text} for text in GOOD]).encode()[:-1] + (b", " if damage[:1] == b"{" else b"")
    *good, last = read(source("a.json", content + damage))
    assert [r.text for r in good] == GOOD
    assert last.lost is not None
    assert "one JSON object a line is wanted (jq -c '.[]' FILE" in last.problem


def test_one_object_with_all_rows_in_it() -> None:
    [record] = read(source("a.json", json.dumps({"version": 1, "data": [{"text": "a"}] * 9}).encode()))
    assert record.lost is not None
    assert record.lost.rows == 9
    assert "9 rows under \"data\"; one JSON object a line is wanted (jq -c '.data[]'" in record.problem


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_conversations_are_named(key: str) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    [record] = read(source("a.jsonl", json.dumps({key: turns}).encode()))
    pq.write_table(pa.table({key: [turns]}), "a.parquet")
    for problem in (record.problem, read(source("a.parquet"))[0].problem):
        assert f"these are conversations (under {key})" in problem
        assert "data.text_key" not in problem


def make_corpus() -> list[str]:
    """Four files, three of which cannot be read; their names."""
    Path("good.jsonl").write_bytes(lines(GOOD))
    pq.write_table(pa.table({"body": ["x"] * 20_000}), "column.parquet")
    pq.write_table(pa.table({"text": list(range(20_000))}), "numbers.parquet")
    Path("corpus.tar").write_bytes(tar([TEXT]))
    return [str(Path(name).resolve()) for name in ("column.parquet", "corpus.tar", "numbers.parquet")]


def make(name: str = "run", say: Callable[[str], None] = lambda _: None, **settings: Any) -> Prepared:
    config = Data(**({"dataset": "files", "paths": ["*.*"], "validation_fraction": 0.0} | settings))
    return prepare(config, Path(name), vocab_size=300, say=say, processes=1)


def deplete(stream: Stream) -> None:
    """Read more rows than an epoch of the corpus has."""
    for _ in range(200):
        stream.row()


@pytest.mark.parametrize("streaming", [False, True])
def test_lost_files_stop_unless_they_are_allowed_by_name(streaming: bool) -> None:
    lost = make_corpus()
    with pytest.raises(LostFiles) as caught:
        make(streaming=streaming)
    message = str(caught.value)
    assert "3 files (at least 40,000 rows, " in message
    assert f"--data.allow_lost_files {' '.join(lost)}\n" in message
    assert f"allow_lost_files = {json.dumps(lost)}" in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message  # workers hand it over
    assert not Path("run").exists()
    with pytest.raises(LostFiles, match=r"1 file \(20,000 rows, [\d,]+ bytes\)"):
        make(streaming=streaming, allow_lost_files=["*/column.*", "corpus.tar"])

    said: list[str] = []
    prepared = make(streaming=streaming, allow_lost_files=lost, say=said.append, max_bad_documents=0)
    if not streaming:
        assert prepared.manifest["corpora"][""]["documents"]["train"] == len(GOOD)
        assert any("warning: 3 files (at least 40,000 rows, " in line for line in said)
        listed = [json.loads(line) for line in Path("run/data_errors.jsonl").read_text().splitlines()]
        assert [(Path(line["file"]).name, line["lost_rows"]) for line in listed] == [
            ("column.parquet", 20_000),
            ("corpus.tar", None),
            ("numbers.parquet", 20_000),
        ]
        return
    options = {"num_streams": 1, "packing": "concat", "seq_len": 64, "seed": 0}
    config = Data(dataset="files", paths=["*.*"], streaming=True, allow_lost_files=lost)
    corpora = streamed_corpora(config, prepared, vocab_size=300)
    stream = Stream(0, corpora, [1.0], None, **options, tokenizer=Tokenizer(prepared.tokenizer))
    deplete(stream)
    assert {problem["file"] for problem in stream.take_problems()} == set(lost)
    recipe = replace(corpora[0].recipe, allow_lost_files=())  # found on the way, as in remote files
    stream = Stream(
        0, [replace(corpora[0], recipe=recipe)], [1.0], None, **options, tokenizer=Tokenizer(prepared.tokenizer)
    )
    with pytest.raises(LostFiles, match="allow_lost_files"):
        deplete(stream)


def test_a_file_that_is_cut_short_is_lost_from_there_on() -> None:
    Path("a.jsonl.gz").write_bytes(gzip.compress(lines(GOOD))[:-30])
    with pytest.raises(LostFiles, match=r"a\.jsonl\.gz, line \d+: the file is damaged or cut short from here on"):
        make()
    assert len(Path("run/data_errors.jsonl").read_text().splitlines()) == 1
    said: list[str] = []
    prepared = make(allow_lost_files=["a.jsonl.gz"], say=said.append)
    assert 100 < prepared.manifest["corpora"][""]["documents"]["train"] < 200
    assert any(line.startswith("resuming the preparation in ") for line in said)
    assert any("warning: 1 file cannot be read and is left out" in line for line in said)


def test_a_large_array_is_one_unit() -> None:
    texts = [f"{i} " + "x" * 2000 for i in range(1500)]
    Path("a.json").write_text(json.dumps([{"text": text} for text in texts]))
    assert make().manifest["corpora"][""]["documents"]["train"] == 1500


def test_one_document_and_no_token_held_out() -> None:
    Path("a.txt").write_text("one")
    said: list[str] = []
    make(say=said.append)
    assert any(line.startswith("tokenized 1 document: ") and line.endswith(", 0 tokens held out") for line in said)


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_prepare_touches_nothing_but_the_prepared_folder(bad: int) -> None:
    Path("a.jsonl").write_bytes(lines(GOOD) + b"{no\n" * bad)
    Path("run").mkdir()
    Path("run/data_errors.jsonl").write_text('{"file": "x", "line": 1, "problem": "y"}\n')
    config = Data(dataset="files", paths=["a.jsonl"], prepared_folder="shared/corpus", max_bad_documents=2)
    said: list[str] = []
    options: dict[str, Any] = {"vocab_size": 300, "say": said.append, "for_run": False}
    place = "shared/corpus"
    if bad == 3:
        place = "shared/corpus.tmp"
        with pytest.raises(UserError, match=r"All are listed in shared/corpus\.tmp/data_errors\.jsonl"):
            prepare(config, Path("run"), **options)
    else:
        prepare(config, Path("run"), **options)
        warned = any(f"cannot be read and is left out; {place}/data_errors.jsonl lists them" in line for line in said)
        assert warned == bool(bad)
    assert [path.name for path in Path("run").iterdir()] == ["data_errors.jsonl"]
    assert '"y"' in Path("run/data_errors.jsonl").read_text()
    assert (Path(place) / "data_errors.jsonl").exists() == bool(bad)


@pytest.mark.parametrize("shared", [False, True])
def test_with_validation_off_everything_is_trained_on(shared: bool) -> None:
    Path("a.jsonl").write_bytes(lines(GOOD))
    Path("c.toml").write_text('[data]\ndataset = "files"\npaths = ["a.jsonl"]\n[training]\nseq_len = 16\n')

    def prepared(enable: str) -> Prepared:
        overrides = ["--job.dump_folder", "run", "--validation.enable", enable, "--model.vocab_size", "320"]
        overrides += ["--data.prepared_folder", "shared"] if shared else []
        return CorpusStore.of(load_config("c.toml", overrides, world_size=None)).get(say=lambda _: None)

    assert prepared("false").manifest["corpora"][""]["documents"] == {"train": 200, "validation": 0}
    assert prepared("false").tokens("validation") == 1  # the end-of-text that each part begins with
    Path("run/checkpoint/step-00000001").mkdir(parents=True)
    with pytest.raises(UserError, match=r"validation\.enable \(no documents were held out while it was false\)"):
        prepared("true")


@pytest.mark.parametrize("kind", ["own", "shared", "streamed"])
def test_a_run_keeps_its_data_when_validation_is_switched_off(kind: str) -> None:
    Path("a.jsonl").write_bytes(lines(GOOD))
    Path("c.toml").write_text(
        '[job]\ndump_folder = "run"\n[model]\nvocab_size = 320\n[data]\ndataset = "files"\npaths = ["a.jsonl"]\n'
        f"{'streaming = true' if kind == 'streamed' else ''}\n[training]\nseq_len = 16\n[validation]\nsteps = 1\n"
    )
    shared = ["--data.prepared_folder", "shared"] if kind == "shared" else []

    def store(enable: str) -> CorpusStore:
        return CorpusStore.of(load_config("c.toml", ["--validation.enable", enable, *shared], world_size=None))

    before = store("true").get(say=lambda _: None)
    Path("run/checkpoint/step-00000001").mkdir(parents=True)
    said: list[str] = []
    for enable in ("false", "true"):
        after = store(enable).get(say=said.append)
        assert after == before
        assert [corpus.recipe for corpus in store(enable).streamed(after)] == [
            corpus.recipe for corpus in store("true").streamed(before)
        ]
    assert said == []  # nothing is prepared again
    Path("run/checkpoint/step-00000001").rmdir()
    if kind == "shared":  # a new run trains on everything, which this folder cannot give
        with pytest.raises(UserError, match=r"validation\.enable \(documents were held out while it was true\)"):
            store("false").get(say=said.append)
    else:
        assert store("false").get(say=said.append).manifest["settings"]["validation_fraction"] == 0
