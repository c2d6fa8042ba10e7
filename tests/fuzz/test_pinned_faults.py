"""Inputs that once were accepted and wrong, did not end, ate the machine, or ended in a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import pickletools
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from tests.fuzz.entries import CONFIG, DIMENSIONS, ENTRIES, _rows, _store
from tests.fuzz.trial import Trial
from torchtitan_style.checkpoint.manifest import _digest, problem_of
from torchtitan_style.checkpoint.reader import SafeReader
from torchtitan_style.common.errors import UserError
from torchtitan_style.common.reading import file_problem, parse_json, parse_toml, read_bytes
from torchtitan_style.common.reporting import reported_errors
from torchtitan_style.data.prepare.prepared import read_prepared
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer
from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.hf_folder import HFFolder


@contextlib.contextmanager
def quickly(*, seconds: float = 5, megabytes: int = 600) -> Iterator[None]:
    """Processor time and memory are bounded."""
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - begin < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes * 1024


def refusal(call: Callable[[], Any], *, seconds: float = 5) -> str:
    with quickly(seconds=seconds), pytest.raises(UserError) as error:
        call()
    assert len(str(error.value)) < 13_000
    return str(error.value)


def write(path: Path, content: str | bytes | dict[str, Any]) -> Path:
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], Path]:
    """A folder with what an entry of the fuzzer has."""

    def make(entry: str) -> Path:
        ENTRIES[entry].setup(tmp_path)
        return tmp_path

    return make


# Silently wrong


@pytest.mark.parametrize("damage", ["zeroed", "cut", "stamp"])
def test_tables_of_packed_rows_are_made_anew(made: Callable[[str], Path], damage: str) -> None:
    folder = made("prepared")
    tables = folder / "run/data/best_fit-32"
    pieces = np.fromfile(tables / "train.pieces", "<i8").reshape(-1, 2)
    if damage == "zeroed":
        pieces[:, 0] = 0
        pieces.tofile(tables / "train.pieces")
    elif damage == "cut":
        os.truncate(tables / "train.rows", 80)
    else:
        (tables / "train.done").write_text("train")
    said: list[str] = []
    prepared = _store(folder).get(say=said.append)
    assert np.array_equal(_rows(prepared), np.load(folder / "rows.npy"))
    assert any("packing rows again" in line for line in said)


@pytest.mark.parametrize("change", ["end_of_text", "tokens"])
def test_a_changed_manifest_of_prepared_data_is_not_used(made: Callable[[str], Path], change: str) -> None:
    path = made("prepared") / "run/data/manifest.json"
    manifest = json.loads(path.read_text())
    if change == "tokens":
        manifest["corpora"][""]["tokens"]["train"] -= 100
    else:
        manifest["end_of_text"] = 7
    write(path, manifest)
    said: list[str] = []
    assert read_prepared(path.parent, said.append) is None
    assert "has changed since it was written" in said[0]


Pieces = Callable[[Any, str], None]


def _no_pieces(metadata: Any, name: str) -> None:
    metadata.state_dict_metadata[name].chunks.clear()


def _one_small_piece(metadata: Any, name: str) -> None:
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([1, 1]))
    metadata.state_dict_metadata[name].chunks[:] = [chunk]


def _twice(metadata: Any, name: str) -> None:
    metadata.state_dict_metadata[name].chunks.append(metadata.state_dict_metadata[name].chunks[0])


def _in_another_file(metadata: Any, name: str) -> None:
    metadata.storage_data[MetadataIndex(name, torch.Size([0, 0]), 0)].relative_path = "../../x.distcp"


@pytest.mark.parametrize("change", [_no_pieces, _one_small_piece, _twice, _in_another_file])
def test_every_weight_is_covered_exactly_once(made: Callable[[str], Path], change: Pieces) -> None:
    folder = made("metadata")
    path = folder / "step-3/.metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata, "model.model.embed_tokens.weight")
    path.write_bytes(pickle.dumps(metadata))
    assert ".metadata: not the metadata of a checkpoint" in refusal(lambda: ENTRIES["metadata"].run(folder))


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "initializer_range"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_settings_are_finite(made: Callable[[str], Path], key: str, value: str) -> None:
    assert "must be finite" in refusal(lambda: load_config("qwen3", [f"--model.{key}", value]))
    path = made("hf config") / "config.json"
    write(path, json.dumps(json.loads(path.read_text()) | {key: float(value)}))
    assert key in refusal(lambda: HFFolder(path.parent))
    path.write_text(path.read_text().replace("NaN", "1e999").replace("Infinity", "1e999"))
    assert key in refusal(lambda: HFFolder(path.parent))


# What does not end, or eats the machine


def test_learning_rates_are_no_list() -> None:
    from torchtitan_style.config.schema import LRScheduler, Optimizer
    from torchtitan_style.models.qwen3.spec import QWEN3
    from torchtitan_style.optim.build import Optimizers

    model = torch.nn.Linear(2, 2)
    with quickly(seconds=2):
        made = Optimizers(model, Optimizer(), LRScheduler(), total_steps=10**12, dtype=torch.float32, spec=QWEN3,
                          head_dim=2)  # fmt: skip
        assert made.learning_rates(1)["lr"] < made.learning_rates(10**11)["lr"]


def test_sizes_are_judged_before_anything_is_made_of_them(made: Callable[[str], Path]) -> None:
    assert "at most" in refusal(lambda: load_config("qwen3", ["--model.num_hidden_layers", str(10**9)]))
    path = made("hf config") / "config.json"
    for key, value in (("num_hidden_layers", 10**7), ("vocab_size", 10**12), ("hidden_size", 10**300)):
        write(path, json.dumps(json.loads(path.read_text()) | {key: value}))
        assert "at most" in refusal(lambda: HFFolder(path.parent))


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_only_regular_files_are_opened(made: Callable[[str], Path], fifo: Path) -> None:
    for path, kind in ((fifo, "a named pipe"), (Path("/dev/zero"), "a device"), (Path("/proc/kmsg"), "the kernel")):
        if path.exists():
            assert kind in str(file_problem(path))
            assert kind in refusal(lambda path=path: load_config(path))
    from torchtitan_style.config.schema import Corpus
    from torchtitan_style.data.sources.corpus import source_files
    from torchtitan_style.data.sources.documents import read_records

    assert "a named pipe" in refusal(lambda: source_files(Corpus(dataset="files", paths=[str(fifo)])))
    if Path("/proc/kmsg").exists():
        [file] = source_files(Corpus(dataset="files", paths=["/proc/kmsg"]))
        assert "kernel" in refusal(lambda: list(read_records(file, text_key="text", max_bytes=100)))
    checkpoint = made("manifest") / "step-3"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    os.mkfifo(checkpoint / "x")
    manifest["files"]["x"] = {"size": 0, "sha256": "0" * 64}
    manifest["manifest_sha256"] = _digest(manifest)
    write(checkpoint / "manifest.json", manifest)
    assert "a named pipe" in str(problem_of(checkpoint))
    with pytest.raises(OSError, match="a device"):
        read_bytes("/dev/zero", most=10)


def test_a_prompt_is_measured_before_it_is_tokenized_whole(made: Callable[[str], Path]) -> None:
    from types import SimpleNamespace

    from torchtitan_style.inference.generate import TextModel

    model: Any = object.__new__(TextModel)
    model.tokenizer = Tokenizer(made("tokenizer"))
    model.config = SimpleNamespace(max_position_embeddings=40_000, vocab_size=300)
    assert "has more than" in refusal(lambda: model.encode("one two three\n" * 2_000_000), seconds=20)
    assert len(model.encode("one two")) > 2


BOMBS = {
    "a memo of gigabytes": b"\x80\x04N" + b"r\xff\xff\xff\x7f" + b".",
    "text of gigabytes": b"\x80\x04\x8d\x00\x00\x00\x00\x01\x00\x00\x00.",
    "bytes of gigabytes": b"\x80\x04\x8e\x00\x00\x00\x00\x01\x00\x00\x00.",
    "a number of many bytes": b"\x80\x04\x8b\xff\xff\xff\x7f.",
    "nested tuples": b"\x80\x04)" + b"\x85" * 200_000 + b".",
    "tuples of tuples": b"\x80\x04)\x94" + b"".join(b"h%ch%c\x86\x94" % (n, n) for n in range(60)) + b".",
    "nested lists": b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
}  # fmt: skip


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_metadata_takes_no_more_memory_than_its_file(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / ".metadata", content)
    with quickly(megabytes=300):
        refusal(lambda: SafeReader(tmp_path).read_metadata())


class _Built:
    """Pickled, it changes an attribute of a class of the program."""

    def __reduce__(self) -> Any:
        return _Built, ()


def test_metadata_changes_no_class(tmp_path: Path) -> None:
    import pathlib

    before = pathlib.PosixPath.is_dir
    content = b"\x80\x04\x8c\x07pathlib\x8c\tPosixPath\x93N}\x8c\x06is_dir\x8c\x04evils\x86b."
    pickletools.dis(content, out=open(os.devnull, "w"))  # noqa: SIM115  # it is a pickle
    write(tmp_path / ".metadata", content)
    assert "an object that it has not created" in refusal(lambda: SafeReader(tmp_path).read_metadata())
    assert pathlib.PosixPath.is_dir is before


def test_metadata_reaches_for_nothing_in_torch(tmp_path: Path) -> None:
    write(tmp_path / ".metadata", pickle.dumps(torch.load))
    assert "which is not allowed in a checkpoint" in refusal(lambda: SafeReader(tmp_path).read_metadata())
    write(tmp_path / ".metadata", b"\x80\x04\x8c\x05torch\x8c\x04load\x93.")
    assert "torch.load" in refusal(lambda: SafeReader(tmp_path).read_metadata())


PARTS: dict[str, dict[str, Any]] = {
    "precompiled": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "replace": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
    "split": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False}},
    "prefix": {"continuing_subword_prefix": "("},
}


@pytest.mark.parametrize("name", PARTS)
def test_a_tokenizer_that_panics_is_named(made: Callable[[str], Path], name: str) -> None:
    path = made("tokenizer") / "tokenizer.json"
    content = json.loads(path.read_text())
    (content["model"] if name == "prefix" else content).update(PARTS[name])
    write(path, content)
    with contextlib.suppress(UserError):  # and nothing else; some versions of the library read it
        Tokenizer(path.parent).encode("x (y) é")


def test_a_tokenizer_that_aborts_does_not_take_the_run_along(made: Callable[[str], Path], monkeypatch: Any) -> None:
    """Which files do that depends on the library's version: here another process does."""
    from torchtitan_style.data.tokenizer import file as tokenizer_file

    path = made("tokenizer") / "tokenizer.json"
    monkeypatch.setattr(tokenizer_file, "_TRY", "import os; os.abort()")
    write(path, json.loads(path.read_text()) | {"decoder": {"type": "Fuse"}})
    assert "by signal 6" in refusal(lambda: Tokenizer(path.parent))


# Tracebacks


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 3000, "1" * 5000, '{"a": 1, "a": 2}', '"\\ud800"', "1" * 400]
)
def test_json_that_no_file_of_ours_has_is_a_value_error(text: str) -> None:
    with quickly(), pytest.raises(ValueError, match=r".") as error:
        parse_json(text)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 100_000, ".".join("a" * 100_000) + " = 1", f"a = {10**20}", f"a = {'1' * 5000}", 'a = "\\u0000"'],
)
def test_toml_that_no_file_of_ours_has_is_a_value_error(text: str) -> None:
    with quickly(), pytest.raises(ValueError, match=r"."):
        parse_toml(text)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.toml", "num_hidden_layers = 2.0"),
        ("train_state.json", {"state": {"step": "3"}, "identity": {}}),
        ("train_state.json", {"state": {"step": 3, "skipped": 1}, "identity": {}}),
        ("train_state.json", {"state": {"step": 3}, "identity": {"data": 3}}),
    ],
)
def test_types_are_checked_where_a_checkpoint_is_read(made: Callable[[str], Path], file: str, change: Any) -> None:
    from torchtitan_style.checkpoint.saved import SavedModel
    from torchtitan_style.common.typed import typed
    from torchtitan_style.train.state import SavedState, TrainState

    folder = made("metadata") / "step-3"
    if file == "config.toml":
        path = folder / file
        write(path, path.read_text().replace("num_hidden_layers = 1", change))
        assert "num_hidden_layers" in refusal(lambda: SavedModel(folder))
    else:
        with pytest.raises(ValueError, match=r"step|skipped|identity"):
            TrainState.from_json(typed(SavedState, change).state)


@pytest.mark.parametrize(
    "change", [{"time": float("nan")}, {"time": 10**20}, {"figures": 3}, {"mesh": {"tp": "x"}}, {"files": 3}]
)
def test_a_forged_manifest_is_shown_as_far_as_it_is_right(made: Callable[[str], Path], change: dict[str, Any]) -> None:
    trial_folder = made("manifest")
    path = trial_folder / "step-3/manifest.json"
    manifest = json.loads(path.read_text()) | change
    manifest["manifest_sha256"] = _digest(manifest)
    write(path, json.dumps(manifest))
    assert "cannot be read" in str(problem_of(path.parent))
    ENTRIES["manifest"].run(trial_folder)


@pytest.mark.parametrize("change", [{"eos_token": 0}, {"bos_token": {}}, {"chat_template": 1}])
def test_tokenizer_settings_of_another_type_are_named(made: Callable[[str], Path], change: dict[str, Any]) -> None:
    folder = made("tokenizer settings")
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink()
    write(folder / "tokenizer_config.json", change)
    assert next(iter(change)) in refusal(lambda: ENTRIES["tokenizer settings"].run(folder))


def test_lines_that_are_no_bad_documents_are_passed_over(made: Callable[[str], Path]) -> None:
    from torchtitan_style.data.sources.problems import BadDocuments

    path = made("list of bad documents") / "data_errors.jsonl"
    path.write_text("5\n{}\n[]\n" + "[" * 5000 + "\n" + path.read_text())
    assert BadDocuments(path, limit=9).count == 1


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{{ [][3].x }}", "{{ 2.0 ** 10000 }}", "{% if %}", "{{ messages[9].content.x.y }}",
     "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(10**9) | list }}"],
)  # fmt: skip
def test_what_a_chat_template_raises_is_one_message(made: Callable[[str], Path], template: str) -> None:
    from torchtitan_style.data.chat.template import ChatTemplate

    folder = made("chat template")
    write(folder / "chat_template.jinja", template)
    found = ChatTemplate.find(folder)
    assert found is not None
    assert "chat_template.jinja" in refusal(lambda: found.render([{"role": "user", "content": "x"}]))


def test_a_chat_template_without_an_end_is_stopped(made: Callable[[str], Path], monkeypatch: Any) -> None:
    from torchtitan_style.data.chat import template

    monkeypatch.setattr(template, "_SECONDS", 1)
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout has one of its own
    folder = made("chat template")
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    write(folder / "chat_template.jinja", loop)
    found = template.ChatTemplate.find(folder)
    assert found is not None
    try:
        assert "more than 1 s" in refusal(lambda: found.render([{"role": "user", "content": "x"}]))
    finally:
        signal.signal(signal.SIGALRM, before)


HEADERS: dict[str, bytes] = {
    "metadata with a number": b'{"__metadata__": {"a": 1}}',
    "a shape of fractions": b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a tensor twice": b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "a": 3}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers_that_the_library_refuses_are_refused(made: Callable[[str], Path], header: bytes) -> None:
    folder = made("hf weights")
    write(folder / "model.safetensors", len(header).to_bytes(8, "little") + header + bytes(4))
    assert "its header cannot be read" in refusal(lambda: HFFolder(folder).check())


def test_an_index_names_files_that_there_can_be(made: Callable[[str], Path]) -> None:
    folder = made("hf index")
    path = folder / "model.safetensors.index.json"
    for name in ("x" * 300, "a\x00", "../a.safetensors"):
        write(path, path.read_text().replace("a.safetensors", json.dumps(name)[1:-1]))
        assert path.name in refusal(lambda: HFFolder(folder).check())
        ENTRIES["hf index"].setup(folder)


def test_sizes_of_shards_are_finite() -> None:
    from torchtitan_style.commands.export_hf import _bytes

    for text in ("9" * 400 + "GB", "0.1B", "1e9GB"):
        assert "--max-shard-size" in refusal(lambda text=text: _bytes(text))
    assert _bytes("5GB") == 5 * 10**9


def test_a_header_of_much_padding_is_refused(made: Callable[[str], Path]) -> None:
    folder = made("hf weights")
    with (folder / "model.safetensors").open("wb") as file:
        file.write((150_000_000).to_bytes(8, "little") + b"{}")
        file.truncate(150_000_008)
    assert "150,000,000 bytes" in refusal(lambda: HFFolder(folder).check())


@pytest.mark.parametrize("kind", ["zst", "gz"])
def test_a_compressed_file_without_its_last_byte_gives_what_it_has(made: Callable[[str], Path], kind: str) -> None:
    from torchtitan_style.config.schema import Corpus
    from torchtitan_style.data.sources.corpus import source_files
    from torchtitan_style.data.sources.documents import read_records

    path = made("corpus a.jsonl") / f"a.jsonl.{kind}"
    if kind == "zst":  # as programs write it that do not know the end before they come to it
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write((path.parent / "a.jsonl").read_bytes())
            stream.flush()
    write(path, path.read_bytes()[:-1])
    [file] = source_files(Corpus(dataset="files", paths=[str(path)]))
    records = list(read_records(file, text_key="text", max_bytes=10_000))
    assert sum(not record.problem for record in records) == 40
    assert "cut short" in records[-1].problem


def test_columns_without_utf8_names_are_no_readable_parquet(made: Callable[[str], Path]) -> None:
    from torchtitan_style.config.schema import Corpus
    from torchtitan_style.data.sources.corpus import source_files
    from torchtitan_style.data.sources.documents import lost_file, read_records

    path = made("corpus a.parquet") / "a.parquet"
    write(path, path.read_bytes().replace(b"text", b"te\xff\xfe"))
    [file] = source_files(Corpus(dataset="files", paths=[str(path)]))
    assert lost_file(file, "text") is not None
    [record] = read_records(file, text_key="text", max_bytes=100)
    assert record.lost


def test_a_damaged_shard_is_one_message(made: Callable[[str], Path]) -> None:
    folder = made("shard")
    path = folder / "step-3/__0_0.distcp"
    write(path, bytes(path.stat().st_size))
    assert "cannot be loaded: rank 0" in refusal(lambda: ENTRIES["shard"].run(folder))
    for error in (dcp.api.CheckpointException("save", {0: (OSError("x"), None)}),):  # type: ignore[arg-type, dict-item]
        with pytest.raises(SystemExit), reported_errors():
            raise error


NAMES = ["a" * 300, "a/" * 3000, "\udcff", "x\x00y"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["job.dump_folder", "data.prepared_folder", "data.tokenizer", "model.hf_assets_path"])
def test_names_that_there_cannot_be(key: str, name: str) -> None:
    assert key in refusal(lambda: load_config("qwen3", [f"--{key}", name]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "command",
    ["generate --prompt x --checkpoint", "checkpoint list", "import-hf --output x --hf", "report", "plan --config"],
)
def test_names_on_command_lines(command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from torchtitan_style.__main__ import main

    with pytest.raises(SystemExit) as error:
        main([*command.split(), name])
    assert error.value.code == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_a_deleted_working_folder_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    code = "import os, sys; os.rmdir(os.getcwd()); from torchtitan_style.__main__ import main; main(['plan'])"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "gone", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: the working folder has been deleted; change into one that exists\n"


# Messages


def test_messages_are_short(tmp_path: Path) -> None:
    for content in (
        "\n".join(f"k{n} = 1" for n in range(20_000)),
        "x = {" + ", ".join(f"k{n} = 1" for n in range(60_000)) + "}",
        f"[job]\ndump_folder = 3\ndescription = [{', '.join(['9'] * 100_000)}]",
    ):
        message = refusal(lambda content=content: load_config(write(tmp_path / "config.toml", content)), seconds=15)
        assert len(message) < 8000
    many = [f"--x.k{n}=1" for n in range(20_000)]
    assert "and 19,980 more" in refusal(lambda: load_config("qwen3", many), seconds=15)


def test_types_of_optional_choices_are_named(tmp_path: Path) -> None:
    from typing import Literal

    from torchtitan_style.config.load import options_of

    assert options_of(Literal["one", "two"] | None) == ["one", "two"]


@pytest.mark.parametrize("text", ["5\nseq_len = 3", "5 # x", "1, 0] #", "5]\n[x"])
def test_an_override_is_one_value(text: str) -> None:
    assert "training.steps: must be a whole number" in refusal(lambda: load_config("qwen3", ["--training.steps", text]))


def test_the_fuzzer_sees_faults() -> None:
    """What it would say of an entry that lets a traceback through, and of one that accepts too little."""
    from dataclasses import replace

    def broken(folder: Path) -> None:
        json.loads((folder / "config.toml").read_text() and "{")

    with pytest.raises(AssertionError, match="JSONDecodeError"):
        Trial(replace(ENTRIES["config"], run=broken))
    assert CONFIG
    assert DIMENSIONS
