"""Every way into the program, as a function of a folder with valid files, one of which is changed before each call.

A call must end in one of two ways: normally, or with a UserError (a RunError where a disk could be at fault). What is
accepted must be right; where that can be checked, the entry does.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import digest_of, sha256

CONFIG = """\
[model]
flavor = "debug"
rope_theta = 10000.0
[data]
dataset = "mixture"
document_mask = true
[[data.mixture]]
name = "one"
weight = 2.0
dataset = "files"
paths = ["*.txt"]
[[data.mixture]]
name = "two"
[training]
steps = 10
seq_len = 64
max_norm = 1.0
[optimizer]
name = "muon"
lr = 0.01
[optimizer.muon]
ns_steps = 4
[lr_scheduler]
warmup_steps = 3
decay_type = "linear"
[comm]
init_timeout_seconds = 60
"""
DIMENSIONS = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "attention_bias": False, "tie_word_embeddings": True, "rope_theta": 1e4,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """files: those that are changed, with their kind (``mutations.mutated``). slow: starts processes."""

    name: str
    files: dict[str, str]
    setup: Callable[[Path], None]
    run: Callable[[Path], None]
    slow: bool = False


# Configuration


def _config(folder: Path) -> None:
    from torchtitan_style.config import to_toml
    from torchtitan_style.launch.configure import load_config

    to_toml(load_config(folder / "config.toml", world_size=2))


def _overrides(folder: Path) -> None:
    from torchtitan_style.launch.configure import load_config

    load_config("qwen3", _split(folder / "overrides"), world_size=1)


def _split(path: Path) -> list[str]:
    """The arguments in a file, one a line."""
    return [line.replace("\\n", "\n") for line in path.read_text("utf-8", errors="surrogateescape").split("\n") if line]


def _command(folder: Path) -> None:
    """Options of the commands, up to where a model would be loaded."""
    from torchtitan_style.__main__ import main

    arguments = [argument.replace("FOLDER", str(folder)) for argument in _split(folder / "arguments")]
    with contextlib.suppress(SystemExit), contextlib.chdir(folder):
        main(arguments)


def _environment(folder: Path) -> None:
    import os
    from unittest import mock

    from torchtitan_style.launch.arguments import read_environment, take_restarts

    pairs = (line.partition("=") for line in _split(folder / "environment"))
    values = {name: value for name, _, value in pairs if name and "\0" not in name + value}
    with mock.patch.dict(os.environ, values):
        read_environment(gpus=0, default_nproc=1)
        take_restarts([])


# Models in Transformers' format


def _write_hf(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from torchtitan_style.models.registry import read_hf_config

    hidden = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "eos_token_id": [1, 2], **DIMENSIONS}
    (folder / "config.json").write_text(json.dumps(hidden))
    spec, config = read_hf_config(hidden)
    tensors = {name: torch.ones(shape) for name, shape in spec.parameter_shapes(config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_sharded_hf(folder: Path) -> None:
    _write_hf(folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    from safetensors import safe_open

    with safe_open(folder / "a.safetensors", framework="np") as file:
        weight_map = dict.fromkeys(file.keys(), "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _hf(folder: Path) -> None:
    from torchtitan_style.models.hf_folder import HFFolder

    found = HFFolder(folder)
    found.check()
    for name in found.spec.parameter_shapes(found.config):
        found.read(name)


# Tokenizers


def _write_tokenizer(folder: Path) -> None:
    from tests.tiny_hf import write_tokenizer

    write_tokenizer(folder, vocab_size=290)


def _tokenizer_json(folder: Path) -> None:
    from torchtitan_style.data.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("The naïve fox (1234)\n 漢字")
    tokenizer.encode_batch(["The naïve fox (1234)\n 漢字", "", "x"])
    tokenizer.decode(ids)


def _tokenizer_settings(folder: Path) -> None:
    from torchtitan_style.data.chat.template import ChatTemplate
    from torchtitan_style.data.tokenizer.tokenizer import Tokenizer
    from torchtitan_style.inference.load import _generation_settings

    tokenizer = Tokenizer(folder)
    _generation_settings(folder, tokenizer)
    if template := ChatTemplate.find(folder):
        template.end_of_turn()


def _template(folder: Path) -> None:
    from torchtitan_style.data.chat.template import ChatTemplate

    if template := ChatTemplate.find(folder):
        template.check()
        template.render([{"role": "user", "content": "x"}])


# Checkpoints


def _write_checkpoint(folder: Path) -> None:
    import torch
    import torch.distributed.checkpoint as dcp

    from torchtitan_style.checkpoint.manifest import seal
    from torchtitan_style.checkpoint.reader import without_warnings
    from torchtitan_style.checkpoint.writer import HashingWriter
    from torchtitan_style.models.registry import spec_of
    from torchtitan_style.train.state import TrainState

    temporary = folder / "tmp"
    temporary.mkdir()
    (temporary / "config.toml").write_text(tomli_w.dumps({"model": DIMENSIONS, "data": {"tokenizer": "train"}}))
    spec = spec_of("qwen3")
    shapes = spec.parameter_shapes(spec.config_class(**DIMENSIONS))
    with without_warnings():
        dcp.save({f"model.{name}": torch.ones(shape) for name, shape in shapes.items()},
                 storage_writer=HashingWriter(temporary), no_dist=True)  # fmt: skip
    state = TrainState(step=3, rows_seen=12, recent_losses=[1.0, 2.0], data={"rows": [12]})
    content = {"state": {**state.__dict__, "skipped": state.skipped.__dict__}, "identity": {"data": {"x": 1}}}
    (temporary / "train_state.json").write_text(json.dumps(content))
    about = {"step": 3, "time": 1.7e9, "mesh": {"tp": 1}, "figures": {"loss": 1.0}, "torch": "2", "data": ["x"]}
    seal(temporary, folder / "step-3", about=about)


def _forge(folder: Path) -> None:
    """Have the manifest agree with the files, as of somebody who knows how."""
    from torchtitan_style.checkpoint.manifest import _digest

    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        for name, entry in manifest["files"].items():
            if (folder / name).is_file() and isinstance(entry, dict):
                size, digest = (folder / name).stat().st_size, sha256(folder / name)
                if name in (".metadata", "train_state.json", "config.toml") or name.endswith(".distcp"):
                    manifest["files"][name] = {"size": size, "sha256": digest}
        manifest["manifest_sha256"] = _digest(manifest)
        path.write_text(json.dumps(manifest))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError, OSError):
        return


def _manifest(folder: Path) -> None:
    from torchtitan_style.checkpoint.manifest import problem_of, read_manifest, readable
    from torchtitan_style.commands.checkpoint import _about, _date
    from torchtitan_style.config.layout import Layout

    checkpoint = folder / "step-3"
    problem_of(checkpoint)
    before = (checkpoint / "manifest.json").read_bytes()
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        manifest = json.loads(before)
        manifest["manifest_sha256"] = digest_of(manifest, but="manifest_sha256")
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        problem_of(checkpoint)
    readable(checkpoint)
    about = _about(checkpoint, hashes=False)
    _date(about)
    if about.get("mesh"):
        Layout(**about["mesh"])
    with contextlib.suppress(OSError, ValueError):
        Layout(**read_manifest(checkpoint).mesh)


def _checkpoint(folder: Path) -> None:
    """Weights must all be there, or the checkpoint be refused."""
    import torch

    from torchtitan_style.checkpoint.saved import SavedModel
    from torchtitan_style.checkpoint.weights import load_weights, stored_dtypes

    source = SavedModel(folder / "step-3")
    if source.config.num_parameters > 1e6:
        return
    shapes = source.spec.parameter_shapes(source.config)
    stored_dtypes(source)
    weights = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    load_weights(source, weights)
    damaged = {name for name, weight in weights.items() if weight.isnan().any()}
    assert not damaged, f"accepted without {sorted(damaged)}"


def _shard(folder: Path) -> None:
    """Its content may be anything; what holds it may not."""
    with contextlib.suppress(AssertionError):
        _checkpoint(folder)


def _train_state(folder: Path) -> None:
    from torchtitan_style.checkpoint.folder import CheckpointFolder
    from torchtitan_style.common.typed import typed
    from torchtitan_style.data.loader import PreparedSteps
    from torchtitan_style.train.state import SavedState, TrainState

    checkpoints = CheckpointFolder(folder)
    checkpoints.newest_state()
    with contextlib.suppress(OSError, ValueError):
        state = TrainState.from_json(typed(SavedState, checkpoints.train_state(3)).state)
        source = PreparedSteps([None], [""], [1.0], global_batch=4, seed=0)  # type: ignore[list-item]
        source.check(state.data)
        np.array(state.data.get("rows", [0])) + np.arange(1)


# Data


def _write_prepared(folder: Path) -> None:
    import shutil

    from tests.data.corpora import texts, write_jsonl

    _write_tokenizer(folder / "hf")
    write_jsonl(folder / "corpus.jsonl", texts(60, seed=0, longest=20))
    _store(folder).get(say=lambda line: None, processes=1)
    shutil.copytree(folder / "run/data", folder / "whole")
    np.save(folder / "rows.npy", _rows(_store(folder).get(say=lambda line: None)))


def _store(folder: Path) -> Any:
    from torchtitan_style.config.schema import Data
    from torchtitan_style.data.prepare.store import CorpusStore

    data = Data(dataset="files", paths=[str(folder / "corpus.jsonl")], tokenizer=str(folder / "hf"), packing="best_fit")
    return CorpusStore(data, folder / "run", vocab_size=300, seq_len=32)


def _rows(prepared: Any) -> Any:
    rows = prepared.rows("", "train", seq_len=32, packing="best_fit")
    return rows.rows(np.arange(rows.num_rows)).inputs


def _prepared(folder: Path) -> None:
    """Whatever has changed, the rows are those that they were."""
    from torchtitan_style.data.prepare.prepared import read_prepared

    if (prepared := read_prepared(folder / "run/data")) is not None and prepared.problem() is None:
        assert np.array_equal(_rows(prepared), np.load(folder / "rows.npy")), "other rows"


def _forged_prepared(folder: Path) -> None:
    from torchtitan_style.data.prepare.prepared import _hash_of, read_prepared

    path = folder / "run/data/manifest.json"
    with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError):
        manifest = json.loads(path.read_bytes())
        manifest["manifest_sha256"] = _hash_of(manifest)
        path.write_text(json.dumps(manifest))
    if (prepared := read_prepared(folder / "run/data")) is not None and prepared.problem() is None:
        prepared.rows("", "train", seq_len=32, packing="concat")


def _write_corpora(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.data.corpora import texts

    documents = texts(40, seed=1, longest=8)
    lines = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(documents)).encode()
    answer = {"role": "assistant", "content": "x"}
    chats = [{"messages": [{"role": "user", "content": text}, answer]} for text in documents]
    contents = {
        "a.jsonl": lines,
        "chat.jsonl": "".join(json.dumps(chat) + "\n" for chat in chats[:10]).encode(),
        "a.json": json.dumps([json.loads(line) for line in lines.splitlines()]).encode(),
        "a.txt": "\n".join(documents).encode(),
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": pa.compress(lines, "zstd", asbytes=True),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    pq.write_table(pa.table({"text": documents, "id": list(range(40))}), folder / "a.parquet", row_group_size=10)


def _corpus(folder: Path) -> None:
    from torchtitan_style.config.schema import Corpus
    from torchtitan_style.data.chat.conversations import Conversations
    from torchtitan_style.data.sources.corpus import source_files
    from torchtitan_style.data.sources.documents import lost_file, read_records
    from torchtitan_style.data.sources.problems import problem_of

    changed = (folder / "changed").read_text()
    for file in source_files(Corpus(dataset="files", paths=[str(folder / changed)])):
        fields = Conversations("messages") if changed.startswith("chat") else "text"
        lost_file(file, fields)
        for record in read_records(file, text_key=fields, max_bytes=10_000):
            if record.problem:
                assert len(json.dumps(problem_of(file, record))) < 10_000, "a problem of many words"


def _write_list(folder: Path) -> None:
    from torchtitan_style.data.sources.problems import BadDocuments

    problems = [{"file": "a.jsonl", "line": 3, "problem": "not JSON"}, {"file": "b.txt", "byte": 0, "problem": "empty"}]
    lost = {"file": "c.parquet", "row": 0, "problem": "gone", "lost_rows": 3, "lost_bytes": None}
    BadDocuments(folder / "data_errors.jsonl", limit=9, allow_lost=["*"]).add([*problems, lost])


def _list(folder: Path) -> None:
    from torchtitan_style.data.sources.problems import BadDocuments, describe_left_out

    bad = BadDocuments(folder / "data_errors.jsonl", limit=9, allow_lost=["*"])
    describe_left_out(bad.count, bad.lost)


# Reports


def _write_run(folder: Path) -> None:
    (folder / "config.toml").write_text(CONFIG)
    lines = [{"step": n, "loss": 5.0 / n, "tokens_seen": n * 64, "time": 1e9 + n, "lr": 0.1} for n in (1, 2, 3)]
    lines.append({"step": 3, "val_loss": 2.0, "time": 1e9 + 4})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [
        {"event": "start", "step": 0, "time": 1e9, "layout": "dp 1"},
        {"event": "checkpoint", "step": 2, "time": 1e9 + 2},
        {"event": "rewind", "step": 3, "to": 2, "time": 1e9 + 3},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))


def _report(folder: Path) -> None:
    from torchtitan_style.report.run import Run

    Run(folder, "run")


def _written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


_OVERRIDES = """--training.steps=5\n--optimizer.lr\n1e-3\n--data.paths\na.txt\nb.txt\n--compile.enable
--model.num_hidden_layers\n4\n--data.allow_lost_files\n["a", "b"]\n--optimizer.muon.lr=0.1\n--job.dump_folder\nout\n"""
_ARGUMENTS = {
    "generate": "generate --checkpoint FOLDER/none --prompt hello --top-p 0.9 --seed 3 --stop x --num-samples 2",
    "checkpoint": "checkpoint show FOLDER --quick --json",
    "eval": "eval --checkpoint FOLDER/none --data FOLDER/a.txt --seq-len 64 --stride 32 --limit 3",
    "import": "import-hf --hf FOLDER/none --output FOLDER/out",
    "export": "export-hf --checkpoint FOLDER/none --output FOLDER/out --dtype bfloat16 --max-shard-size 5GB",
    "plan": "plan --config qwen3 --world-size 4 --device h100",
    "report": "report FOLDER/none --output FOLDER/x.html",
}
_ENVIRONMENT = "NPROC=2\nNNODES=2\nNODE_RANK=1\nRDZV_ENDPOINT=node0:29500\nMAX_RESTARTS=3\nNGPU=1\n"


def _listing(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "arguments").write_text("\n".join(shlex.split(_ARGUMENTS[name])))

    return write


def _one_of(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        _write_corpora(folder)
        (folder / "changed").write_text(name)

    return write


def _after_forging(run: Callable[[Path], None]) -> Callable[[Path], None]:
    def call(folder: Path) -> None:
        _forge(folder / "step-3")
        run(folder)

    return call


_TOKENIZER_SETTINGS = {
    f"{name}.json": "json" for name in ("tokenizer_config", "special_tokens_map", "generation_config")
}
_PREPARED = "run/data/"
_TABLES = {f"{_PREPARED}best_fit-32/train.{kind}": "bytes" for kind in ("pieces", "rows")}
_STAMP = {f"{_PREPARED}best_fit-32/train.done": "json"}

ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("config", {"config.toml": "toml"}, _written("config.toml", CONFIG), _config),
        Entry("overrides", {"overrides": "bytes"}, _written("overrides", _OVERRIDES), _overrides),
        *(Entry(f"command {name}", {"arguments": "bytes"}, _listing(name), _command) for name in _ARGUMENTS),
        Entry("environment", {"environment": "bytes"}, _written("environment", _ENVIRONMENT), _environment),
        Entry("hf config", {"config.json": "json"}, _write_hf, _hf),
        Entry("hf weights", {"model.safetensors": "bytes"}, _write_hf, _hf),
        Entry("hf index", {"model.safetensors.index.json": "json"}, _write_sharded_hf, _hf),
        Entry("tokenizer", {"tokenizer.json": "json"}, _write_tokenizer, _tokenizer_json, slow=True),
        Entry("tokenizer settings", _TOKENIZER_SETTINGS, _write_tokenizer, _tokenizer_settings),
        Entry("chat template", {"chat_template.jinja": "bytes"}, _write_tokenizer, _template),
        Entry("manifest", {"step-3/manifest.json": "json"}, _write_checkpoint, _manifest),
        Entry("config of a checkpoint", {"step-3/config.toml": "toml"}, _write_checkpoint, _after_forging(_checkpoint)),
        Entry("metadata", {"step-3/.metadata": "bytes"}, _write_checkpoint, _checkpoint),
        Entry("shard", {"step-3/__0_0.distcp": "bytes"}, _write_checkpoint, _shard),
        Entry("train state", {"step-3/train_state.json": "json"}, _write_checkpoint, _train_state),
        Entry("prepared", {f"{_PREPARED}manifest.json": "json", **_TABLES, **_STAMP}, _write_prepared, _prepared),
        Entry("forged prepared", {f"{_PREPARED}manifest.json": "json"}, _write_prepared, _forged_prepared),
        *(
            Entry(f"corpus {name}", {name: kind}, _one_of(name), _corpus)
            for name, kind in (
                *(("a.jsonl", "jsonl"), ("chat.jsonl", "jsonl"), ("a.json", "json"), ("a.txt", "bytes")),
                *(("a.jsonl.gz", "bytes"), ("a.jsonl.zst", "bytes"), ("a.parquet", "bytes")),
            )
        ),
        Entry("list of bad documents", {"data_errors.jsonl": "jsonl"}, _write_list, _list),
        Entry(
            "report", {"metrics.jsonl": "jsonl", "events.jsonl": "jsonl", "config.toml": "toml"}, _write_run, _report
        ),
    )
}


def is_expected(error: BaseException) -> bool:
    """Whether a call may end with it."""
    return isinstance(error, UserError)
