"""The documents of one file against a plain reading of it, and every way in which a file can be bad."""

from __future__ import annotations

import bz2
import gzip
import http.server
import json
import lzma
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchtitan_style.common.errors import RunError, UserError
from torchtitan_style.config.schema import Corpus
from torchtitan_style.data.sources import documents, network, parquet
from torchtitan_style.data.sources.corpus import SourceFile, source_files
from torchtitan_style.data.sources.documents import read_records
from torchtitan_style.data.sources.records import EMPTY, Record

LIMIT = 5_000_000


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".zst": zstd,
}
SCRIPTS = [
    "ascii",
    "Straße",
    "Ελληνικά",
    "русский",
    "العربية",
    "हिन्दी",
    "日本語",
    "한국어",
    "🙂👩\u200d👩\u200d👧",
    "\x00\x7f",
    "𒀀",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(network, "_FIRST_WAIT", 1e-4)
    return tmp_path


def source(name: str, content: bytes | None = None) -> SourceFile:
    if content is not None:
        Path(name).write_bytes(content)
    [file] = source_files(Corpus(dataset="files", paths=[name]))
    return file


def read(file: SourceFile, *, text_key: str = "text", max_bytes: int = LIMIT, **options: Any) -> list[Record]:
    return list(read_records(file, text_key=text_key, max_bytes=max_bytes, **options))


def texts(records: list[Record]) -> list[str]:
    assert not [record for record in records if record.problem]
    return [record.text for record in records]


def some_texts(count: int = 3000, seed: int = 0) -> list[str]:
    """Documents in many scripts, of very different lengths."""
    rng = random.Random(seed)
    return [f"{i}\n" + " ".join(rng.choices(SCRIPTS, k=int(rng.paretovariate(1)) % 300 + 1)) for i in range(count)]


def json_lines(documents: list[str], *, ascii: bool = False) -> bytes:
    return b"".join(json.dumps({"id": 1, "text": t}, ensure_ascii=ascii).encode() + b"\n" for t in documents)


@pytest.mark.parametrize("ascii", [False, True])
@pytest.mark.parametrize("ending", PACK)
def test_lines_of_jsonl(ending: str, ascii: bool) -> None:
    expected = some_texts()
    records = read(source(f"a.jsonl{ending}", PACK[ending](json_lines(expected, ascii=ascii))))
    assert texts(records) == expected
    assert [(r.index, r.place) for r in records] == [(i, i + 1) for i in range(len(expected))]
    consumed = [r.consumed for r in records]
    assert consumed == sorted(consumed)
    assert consumed[-1] == Path(f"a.jsonl{ending}").stat().st_size


@pytest.mark.parametrize(
    "type", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), "string")]
)
def test_rows_of_parquet(type: pa.DataType) -> None:
    expected = some_texts()  # more than are read at once
    try:
        column = pa.array(expected).cast(type)
    except pa.ArrowNotImplementedError as error:  # the oldest pyarrow has no cast to string_view
        pytest.skip(str(error))
    table = pa.table({"id": range(3000), "text": column})
    pq.write_table(table, "a.parquet", row_group_size=700, store_schema=True)
    records = read(source("a.parquet"))
    assert texts(records) == expected
    assert [(r.index, r.place) for r in records] == [(i, i) for i in range(3000)]
    assert [r.consumed for r in records] == sorted(r.consumed for r in records)


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("kind", ["lines", "one line", "short"])
def test_text_is_cut_at_line_ends_or_else_between_characters(ending: str, kind: str) -> None:
    text = {"short": "first\n\nlast, 日本語 🙂", "lines": "".join(f"{i} 日本語 🙂 é\n" for i in range(150_000))}.get(
        kind, "a" + "日🙂é" * 400_000
    )
    records = read(source(f"a.md{ending}", PACK[ending](text.encode())))
    pieces = texts(records)
    assert "".join(pieces) == text
    sizes = [len(piece.encode()) for piece in pieces]
    assert [r.place for r in records] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert max(sizes) <= 2**20
    assert all(size > 2**20 - 50 for size in sizes[:-1])
    if kind == "lines":
        assert all(piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize("piece", range(8, 21))
def test_no_character_is_cut(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", piece)
    text = "a日🙂é𒀀" * 50
    pieces = texts(read(source("a.txt", text.encode())))
    assert "".join(pieces) == text
    assert all(piece - 4 <= len(part.encode()) <= piece for part in pieces[:-1])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"])
def test_any_record_can_be_the_first(name: str) -> None:
    expected = some_texts(1000)
    expected[500] = ""
    if name == "a.parquet":
        pq.write_table(pa.table({"text": expected}), name, row_group_size=300)
    elif name == "a.txt":
        Path(name).write_bytes(b"0123456789 line\n" * 400_000)
    else:
        Path(name).write_bytes(PACK[name.removeprefix("a.jsonl")](json_lines(expected) + b"\n\n{broken\n"))
    file = source(name)
    whole = read(file)
    for start in (0, 1, 5, 299, 300, 301, 500, 501, 999, 1000, 1002, 1003, 5000):
        records = read(file, start=start)
        assert [replace(r, consumed=0) for r in records] == [replace(r, consumed=0) for r in whole if r.index >= start]


def test_spans_cover_a_jsonl_file_once_wherever_it_is_cut() -> None:
    content = '{"text": "é1"}\n\n{"text": "2🙂"}\r\n{no\n{"text": ""}\n\n\n{"text": "last"}'.encode()
    file = source("a.jsonl", content)
    whole = [(r.text, r.problem) for r in read(file)]
    assert len(whole) == 5
    size = len(content)
    for cuts in [[0, cut, size] for cut in range(1, size)] + [[*range(0, size, step), size] for step in (1, 2, 7)]:
        parts = [read(file, span=span) for span in pairwise(cuts)]
        assert [(r.text, r.problem) for part in parts for r in part] == whole
    for cut in range(1, size):
        first_line = content[: cut - 1].count(b"\n") + 1  # lines before the first that begins at or after the cut
        expected = [r.place - first_line for r in read(file) if r.place > first_line]
        assert [r.place for r in read(file, span=(cut, size))] == expected


def test_spans_of_a_large_jsonl_file_and_of_a_parquet_file() -> None:
    expected = some_texts(2000)
    file = source("a.jsonl", json_lines(expected))
    rng = random.Random(1)
    for _ in range(20):
        cuts = [0, *sorted(rng.sample(range(1, file.size), rng.randint(1, 9))), file.size]
        assert texts([r for a, b in pairwise(cuts) for r in read(file, span=(a, b))]) == expected
    pq.write_table(pa.table({"text": expected}), "a.parquet", row_group_size=300)
    file = source("a.parquet")
    assert len(parquet.parquet_groups(file)) == 7
    for cut in range(1, 7):
        parts = read(file, span=(0, cut)) + read(file, span=(cut, 7))
        assert texts(parts) == expected
        assert [r.index for r in parts] == list(range(2000))
    assert [r.index for r in read(file, span=(2, 4), start=800)] == list(range(800, 1200))


# A line, and its problem.
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8 text"),
    "not JSON": (b'{"text": "b"', "not JSON"),
    "deeper than Python goes": (b'{"text": ' + b"[" * 200_000, "not JSON"),
    "no such key": (b'{"txt": "b", "id": 1}', 'no text under "text"; it has txt, id; data.text_key names'),
    "a number": (b'{"text": 3}', 'no text under "text", but 3'),
    "null": (b'{"text": null}', "empty"),
    "a list": (b'["text"]', "not a JSON object"),
    "half a surrogate pair": (b'{"text": "\\ud83d"}', "not Unicode text"),
    "empty": (b'{"text": ""}', EMPTY),
    "10 MB": (json.dumps({"text": "é" * 5_000_000}, ensure_ascii=False).encode(), "10,000,000 bytes of text, more"),
    "over-long line": (b'{"text": "' + b"x" * 31_000_000 + b'"}', "longer than data.max_document_bytes = 5,000,000"),
    "byte order mark inside": (b'\xef\xbb\xbf{"text": "b"}', "not JSON"),
}


@pytest.mark.parametrize(("line", "problem"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_a_problem_and_reading_goes_on(line: bytes, problem: str) -> None:
    good = b'{"text": "a"}\n'
    for content, place in ((good + b"\n" + line + b"\n" + good, 3), (good + line, 2)):
        records = read(source("a.jsonl", content))
        [bad] = [record for record in records if record.problem]
        assert (bad.place, bad.index, bad.text) == (place, place - 1, "")
        assert problem in bad.problem
        assert [r.text for r in records if not r.problem] == ["a"] * (len(records) - 1)
        assert len(records) == 2 + (place == 3)
        assert records[-1].consumed == len(content)


def test_the_limit_counts_bytes_of_text() -> None:
    content = json_lines(["é" * 50, "é" * 51, "x" * 100, "x" * 101], ascii=True)
    records = read(source("a.jsonl", content), max_bytes=100)
    assert [bool(r.problem) for r in records] == [False, True, False, True]
    pq.write_table(pa.table({"text": ["é" * 50, "é" * 51, "x" * 100, "x" * 101]}), "a.parquet")
    assert [bool(r.problem) for r in read(source("a.parquet"), max_bytes=100)] == [False, True, False, True]


def test_byte_order_marks_blank_lines_and_carriage_returns() -> None:
    content = b'\xef\xbb\xbf{"text": "a\\r\\n"}\r\n\r\n  \n{"text": "b"}\r\n\n'
    assert [(r.text, r.place) for r in read(source("a.jsonl", content))] == [("a\r\n", 1), ("b", 4)]
    assert texts(read(source("a.txt", b"\xef\xbb\xbffirst\r\nlast\r\n"))) == ["first\r\nlast\r\n"]


def test_the_field_with_the_text_can_be_named() -> None:
    line = json.dumps({"text": "no", "body": "yes"}).encode()
    assert texts(read(source("a.jsonl", line), text_key="body")) == ["yes"]
    pq.write_table(pa.table({"text": ["no"], "body": ["yes"]}), "a.parquet")
    assert texts(read(source("a.parquet"), text_key="body")) == ["yes"]


def test_a_bad_row_of_parquet_does_not_take_others_with_it() -> None:
    values = [b"a", b"caf\xe9", None, b"", b"b", b"\xed\xa0\xbd", b"x" * 200, "日本".encode()]
    arrays = pa.array(values, pa.binary())
    column = pa.StringArray.from_buffers(len(arrays), *arrays.buffers()[1:], arrays.buffers()[0], arrays.null_count)
    pq.write_table(pa.table({"text": column}), "a.parquet")
    records = read(source("a.parquet"), max_bytes=100)
    assert [r.text for r in records] == ["a", "", "", "", "b", "", "", "日本"]
    said = ["", "not UTF-8", EMPTY, EMPTY, "", "not UTF-8", "200 bytes of text", ""]
    assert all(
        part in record.problem and bool(part) == bool(record.problem)
        for part, record in zip(said, records, strict=True)
    )


COLUMNS: dict[str, tuple[dict[str, pa.Array], str]] = {
    "missing": ({"txt": pa.array(["a"]), "id": pa.array([1])}, 'no column "text"; it has txt, id'),
    "numbers": ({"text": pa.array([1, 2])}, "does not hold text but int64"),
    "lists": ({"text": pa.array([["a"]])}, "does not hold text but list"),
    "nothing": ({"text": pa.array([None, None])}, "does not hold text but null"),
}


@pytest.mark.parametrize(("columns", "problem"), COLUMNS.values(), ids=COLUMNS)
def test_a_column_without_text(columns: dict[str, pa.Array], problem: str) -> None:
    pq.write_table(pa.table(columns), "a.parquet")
    [record] = read(source("a.parquet"))
    assert problem in record.problem


@pytest.mark.parametrize("damage", ["cut short", "no parquet", "empty", "footer"])
def test_an_unreadable_parquet_file_is_one_problem(damage: str) -> None:
    pq.write_table(pa.table({"text": ["text"] * 100}), "a.parquet")
    content = Path("a.parquet").read_bytes()
    size = int.from_bytes(content[-8:-4], "little")
    footer = content[: -8 - size] + b"\xff" * size + content[-8:]
    content = {"cut short": content[: len(content) // 2], "no parquet": b"text", "empty": b""}.get(damage, footer)
    file = source("a.parquet", content)
    [record] = read(file)
    assert "not a readable parquet file" in record.problem
    assert "\n" not in record.problem
    assert parquet.parquet_groups(file) == []


def test_a_damaged_page_costs_its_row_group_only() -> None:
    expected = some_texts(900)
    pq.write_table(pa.table({"text": expected}), "a.parquet", row_group_size=300, use_dictionary=False)
    column = pq.read_metadata("a.parquet").row_group(1).column(0)
    content = bytearray(Path("a.parquet").read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 400] = b"\xff" * 400
    content[column.data_page_offset : column.data_page_offset + 8] = b"\xff" * 8
    file = source("a.parquet", bytes(content))
    records = read(file)
    [bad] = [record for record in records if record.problem]
    assert 300 <= bad.index == bad.place < 600
    assert bad.problem.startswith("rows up to 599 are damaged: ")
    good = [(r.index, r.text) for r in records if not r.problem]
    assert [i for i, _ in good] == [*range(bad.index), *range(600, 900)]
    assert all(text == expected[index] for index, text in good)
    assert read(file) == records


@pytest.mark.parametrize("ending", [ending for ending in PACK if ending])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("damage", ["cut short", "changed"])
def test_a_damaged_archive_is_read_up_to_the_damage(ending: str, name: str, damage: str) -> None:
    expected = some_texts(20_000, seed=2)
    plain = json_lines(expected) if name == "a.jsonl" else "\n".join(expected).encode()
    content = PACK[ending](plain)
    half = len(content) // 2
    spoilt = content[:half] if damage == "cut short" else content[:half] + bytes(64) + content[half + 64 :]
    file = source(name + ending, spoilt)
    records = read(file)
    assert "the file is damaged or cut short from here on" in records[-1].problem
    if ending == ".gz" and damage == "changed":
        pass  # only its check sum, at the end, tells
    elif name == "a.jsonl":
        good = [r for r in records if not r.problem]
        assert [r.text for r in good] == expected[: len(good)]
        assert records[-1].index == len(records) - 1
        assert records[-1].place == len(records)
    else:
        read_text = "".join(r.text for r in records)
        assert plain.startswith(read_text.encode())
        assert records[-1].place == len(read_text.encode())
    assert read(file) == records


def test_text_that_is_not_utf8() -> None:
    file = source("a.txt", b"a line\n" * 200_000 + b"caf\xe9\n" + b"a line\n" * 200_000)
    records = read(file)
    assert [bool(r.problem) for r in records] == [False, True, False]
    assert "not UTF-8" in records[1].problem
    [record] = read(source("b.txt", b""))
    assert record.problem == EMPTY
    code = SourceFile(str(Path("c.py").absolute()), 5, "", "source", "")
    Path("c.py").write_bytes(b"caf\xe9\n")
    assert texts(read(code)) == ["caf\ufffd\n"]
    Path("c.py").write_bytes(b"")
    assert read(code) == []


def test_a_local_file_that_cannot_be_opened_is_a_user_error() -> None:
    file = source("a.jsonl", b"{}")
    Path("a.jsonl").unlink()
    with pytest.raises(UserError, match=r"data\.paths: .*a\.jsonl: cannot be read: No such file"):
        read(file)


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` by name, with Range as big stores do or without, and fails when told."""

    files: dict[str, bytes]
    ranges = True
    sized = True
    failures: Iterator[str]
    """What becomes of each request of content, in turn: "" as it should be, "500", "cut" or "hang up"."""

    def handle_error(self, *arguments: object) -> None:
        """Clients that hang up are no matter."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        content = self.server.files.get(self.path.strip("/").partition("?")[0])
        if content is None:
            self.send_error(404)
            return
        failure = next(self.server.failures, "")
        if failure == "500":
            self.send_error(500, "no luck")
            return
        wanted = self.headers.get("Range") if self.server.ranges else None
        total = len(content)
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            content = content[int(first) : int(last) + 1 if last else total]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{total}")
        else:
            self.send_response(200)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"v1"')
        if self.server.sized:
            self.send_header("Content-Length", str(len(content)))
        else:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if not body:
            return
        sent = content[: len(content) // 2] if failure == "cut" else content
        for at in range(0, len(sent), 50_000):
            part = sent[at : at + 50_000]
            self.wfile.write(part if self.server.sized else b"%x\r\n%s\r\n" % (len(part), part))
        if failure == "cut":
            self.close_connection = True
        elif not self.server.sized:
            self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def server() -> Iterator[Server]:
    import fsspec

    fsspec.filesystem("http").clear_instance_cache()
    with Server(("127.0.0.1", 0), Handler) as made:
        made.files, made.failures = {}, iter(())
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def remote(server: Server, name: str) -> SourceFile:
    [file] = source_files(Corpus(dataset="files", paths=[f"http://127.0.0.1:{server.server_port}/{name}"]))
    assert file.is_remote
    return file


REMOTE = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.parquet", "a.txt"]


def serve(server: Server, name: str) -> list[str]:
    """Put a file of 12 MB on the server: fsspec asks for 5 MB at a time."""
    rng = random.Random(3)
    expected = [f"{i} 日本語 " + rng.randbytes(600).hex() for i in range(10_000)]
    if name == "a.parquet":
        pq.write_table(pa.table({"text": expected}), name, row_group_size=1000, use_dictionary=False)
        server.files[name] = Path(name).read_bytes()
    elif name == "a.txt":
        server.files[name] = "\n".join(expected).encode()
    else:
        server.files[name] = PACK[name.removeprefix("a.jsonl")](json_lines(expected))
    return expected


@pytest.mark.parametrize("name", REMOTE)
def test_a_network_that_fails_loses_and_repeats_nothing(
    server: Server, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = serve(server, name)
    file = remote(server, name)
    assert file.size == len(server.files[name])
    assert "v1" in file.version
    server.failures = iter(["500", "", "cut", "500", "", "", "cut", "cut", "", "500"])
    records = read(file)
    assert not any(record.problem for record in records)
    if name == "a.txt":
        assert "".join(record.text for record in records) == "\n".join(expected)
        Path(name).write_bytes(server.files[name])
        assert [r.text for r in records] == [r.text for r in read(source(name))]
    else:
        assert [record.text for record in records] == expected
        assert [record.index for record in records] == list(range(len(expected)))
    assert "attempt 2 of 8" in capsys.readouterr().err
    assert read(file, start=3) == records[3:]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt"])
def test_a_server_that_neither_knows_sizes_nor_sends_parts(server: Server, name: str) -> None:
    server.ranges = server.sized = False
    expected = serve(server, name)
    file = remote(server, name)
    server.failures = iter(["500", "", "500", "500", "", "", "cut"])
    records = read(file)
    if name == "a.txt":
        Path(name).write_bytes(server.files[name])
        assert [(r.place, r.text) for r in records] == [(r.place, r.text) for r in read(source(name))]
    else:
        assert texts(records) == expected


@pytest.mark.parametrize("sized", [True, False])
def test_parquet_needs_a_server_that_sends_parts(server: Server, sized: bool) -> None:
    server.ranges, server.sized = False, sized
    serve(server, "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read: (The HTTP server|Cannot seek)"):
        read(remote(server, "a.parquet"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.parquet"])
def test_a_damaged_remote_file_is_no_network_error(server: Server, name: str) -> None:
    serve(server, name)
    server.files[name] = server.files[name][: len(server.files[name]) // 2]
    records = read(remote(server, name))
    assert "damaged or cut short" in records[-1].problem or "not a readable parquet" in records[-1].problem


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_patience_has_an_end(server: Server, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    serve(server, name)
    file = remote(server, name)
    server.failures = iter(["500"] * 100)
    with pytest.raises(RunError, match=r"a\.\w+ could not be read in 8 attempts: .*500"):
        read(file)
    assert capsys.readouterr().err.count("warning: ") == 7


def test_a_remote_file_that_is_not_there(server: Server) -> None:
    with pytest.raises(UserError, match=r"data\.paths: there is no http://"):
        remote(server, "b.jsonl")
    serve(server, "a.jsonl")
    file = remote(server, "a.jsonl")
    server.files.clear()
    with pytest.raises(UserError, match="cannot be read"):
        read(file)


@pytest.mark.parametrize("parts", [1, 3, 7, 40])
@pytest.mark.parametrize("name", ["lines.jsonl", "zipped.jsonl.gz", "table.parquet", "long.txt"])
def test_shares_have_every_record_once(tmp_path: Path, name: str, parts: int) -> None:
    texts = [f"document {number}" for number in range(60)]
    path = tmp_path / name
    if name == "table.parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=7)  # 9 groups: fewer than 40 parts
    elif name == "long.txt":
        path.write_text("".join(f"{number} {'x' * 400_000}\n" for number in range(12)))
    else:
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    file = source_files(Corpus(dataset="files", paths=[str(path)]))[0]

    def read(**options: Any) -> list[tuple[int, str]]:
        return [(r.index, r.text) for r in read_records(file, text_key="text", max_bytes=10**6, **options)]

    shares = [read(share=(number, parts)) for number in range(parts)]
    assert sorted(record for share in shares for record in share) == read()
    for number, share in enumerate(shares):
        assert share == sorted(share)
        middle = share[len(share) // 2][0] if share else 0
        assert read(share=(number, parts), start=middle) == [record for record in share if record[0] >= middle]
    if parts <= 9 and name != "long.txt":
        assert all(shares)
