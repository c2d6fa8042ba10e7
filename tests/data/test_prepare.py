"""A corpus becomes shards and a tokenizer, once, whatever gets in the way; a mistake leaves nothing behind."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import transformers

from tests.conftest import ENVIRONMENT
from tests.data.corpora import prepare
from torchtitan_style.common.errors import RunError, UserError
from torchtitan_style.config.schema import Data
from torchtitan_style.data.prepare import tokenize
from torchtitan_style.data.prepare.prepared import Prepared
from torchtitan_style.data.prepare.store import CorpusStore
from torchtitan_style.data.rows import Rows
from torchtitan_style.data.streams import Stream
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer
from torchtitan_style.launch.configure import load_config

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
MANY = [*WORDS, *(f"w{i}" for i in range(1000))]


def write_corpus(folder: Path, count: int = 400) -> list[str]:
    """``count`` different documents, one in ten of them twice."""
    texts = [f"{i}: " + " ".join(WORDS[(i * k) % 10] for k in range(1, 8)) for i in range(count)]
    texts += texts[::10]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
    return texts


def run(
    folder: Path,
    *,
    name: str = "run",
    vocab_size: int = 320,
    say: Callable[[str], None] = lambda _: None,
    processes: int | None = None,
    allow_changed_data: bool = False,
    for_run: bool = True,
    **settings: Any,
) -> Prepared:
    """Prepare ``folder``/run from ``folder``/corpus.jsonl."""
    config = Data(**({"dataset": "files", "paths": [str(folder / "corpus.jsonl")]} | settings))
    options = {"processes": processes, "allow_changed_data": allow_changed_data, "for_run": for_run}
    return prepare(config, folder / name, vocab_size=vocab_size, say=say, **options)


def token_ids(prepared: Prepared, part: str, name: str = "") -> np.ndarray:
    """Token ids of a part, read file by file, without the end-of-text that it begins with."""
    place = prepared.folder / name
    ids = np.concatenate(
        [np.fromfile(path, prepared.manifest["dtype"]) for path in sorted(place.glob(f"{part}-*.bin"))]
    )
    assert len(ids) == prepared.manifest["corpora"][name]["tokens"][part]
    assert ids[0] == prepared.manifest["end_of_text"]
    return ids[1:]


def documents(prepared: Prepared, part: str, name: str = "") -> list[str]:
    """Documents of a part, by the lengths in its index."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(prepared.tokenizer)
    ids = token_ids(prepared, part, name)
    indices = sorted((prepared.folder / name).glob(f"{part}-*.index"))
    ends = np.cumsum(np.concatenate([np.fromfile(path, "<u4") for path in indices]).astype(np.int64))
    assert len(ends) == prepared.manifest["corpora"][name]["documents"][part]
    if not len(ends):
        assert not len(ids)
        return []
    assert ends[-1] == len(ids)
    assert set(ids[ends - 1].tolist()) == {prepared.manifest["end_of_text"]}
    return [tokenizer.decode(document[:-1]) for document in np.split(ids, ends)[:-1]]


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file with its inode, time and content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*-*.*") if path.suffix in (".bin", ".index")}


def save_tokenizer(folder: Path, *, eos: str | None = "</s>", vocab_size: int = 300) -> tokenizers.Tokenizer:
    """A Hugging Face tokenizer that is unlike the one that would be trained."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", *([eos] if eos else [])],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    backend.add_tokens([f"<{i}>" for i in range(vocab_size - backend.get_vocab_size())])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos).save_pretrained(folder)
    return backend


def save_word_tokenizer(folder: Path) -> None:
    """A token per word: quick, for large corpora."""
    vocabulary = {word: i for i, word in enumerate(["</s>", "?", *MANY])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)


def test_files_are_there_as_documented(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    prepared = run(tmp_path)
    assert set(snapshot(tmp_path / "run")) == {
        "data/manifest.json",
        *(f"data/{part}-00000.{kind}" for part in ("train", "validation") for kind in ("bin", "index")),
        *(f"{place}tokenizer/{name}.json" for place in ("", "data/") for name in ("tokenizer", "tokenizer_config")),
    }
    manifest = json.loads((tmp_path / "run/data/manifest.json").read_text(encoding="utf-8"))
    assert prepared == Prepared(tmp_path / "run/data", manifest)
    assert sum(manifest["corpora"][""]["documents"].values()) == 440
    digest = subprocess.run(["sha256sum", tmp_path / "corpus.jsonl"], capture_output=True, text=True, check=True).stdout
    assert manifest["corpora"][""]["sources"][0]["digest"] == digest.split()[0]
    assert prepared.tokens("train") == len(token_ids(prepared, "train")) + 1


def test_every_document_is_on_one_side_once_and_its_copies_too(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path)
    prepared = run(tmp_path, validation_fraction=0.25)
    train, held_out = documents(prepared, "train"), documents(prepared, "validation")
    assert Counter(train) + Counter(held_out) == Counter(texts)
    assert not set(train) & set(held_out)
    assert train == [text for text in texts if text in set(train)]  # in the corpus's order
    # Documents fall on a side independently: within 5 standard deviations of the share asked for.
    assert abs(len(set(held_out)) - 100) < 5 * math.sqrt(400 * 0.25 * 0.75)


def test_nothing_is_held_out_if_not_asked_for(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path)
    prepared = run(tmp_path, validation_fraction=0.0)
    assert documents(prepared, "train") == texts
    assert documents(prepared, "validation") == []


def test_large_vocabularies_take_four_bytes_a_token(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path)
    assert run(tmp_path, vocab_size=2**16).manifest["dtype"] == "<u2"
    prepared = run(tmp_path, vocab_size=2**16 + 1, validation_fraction=0.0)
    assert prepared.manifest["dtype"] == "<u4"
    assert documents(prepared, "train") == texts


def test_files_of_every_kind_in_one_corpus(tmp_path: Path) -> None:
    write_corpus(tmp_path, 50)
    (tmp_path / "a.txt").write_text("a text\r\nof lines\n", encoding="utf-8", newline="")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n{"text": "\\u65e5"}\n'))
    pq.write_table(pa.table({"text": ["row 0", "row 1"]}), tmp_path / "c.parquet")
    paths = [str(tmp_path / name) for name in ("a.txt", "b.jsonl.gz", "c.parquet")]
    prepared = run(tmp_path, paths=paths, validation_fraction=0.0)
    assert documents(prepared, "train") == ["a text\r\nof lines\n", "packed", "日", "row 0", "row 1"]


def test_a_mixture(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": f"b {i}"}) + "\n" for i in range(90)))
    mixture = [
        {"name": "a", "weight": 3, "dataset": "files", "paths": [str(tmp_path / "corpus.jsonl")]},
        {"name": "b", "dataset": "files", "paths": [str(tmp_path / "b.jsonl")], "text_key": "body"},
    ]
    said: list[str] = []
    prepared = run(tmp_path, dataset="mixture", paths=[], mixture=mixture, say=said.append)
    assert prepared.names == ["a", "b"]
    both = [Counter(d for part in ("train", "validation") for d in documents(prepared, part, n)) for n in "ab"]
    assert both == [Counter(texts), Counter(f"b {i}" for i in range(90))]
    assert prepared.tokens("train") == sum(len(token_ids(prepared, "train", name)) + 1 for name in "ab")
    assert any("tokenized 440 documents of a: " in line for line in said)
    assert prepared.fingerprint("a") != prepared.fingerprint("b")
    with pytest.raises(UserError, match=r"the corpus b has only \d+ tokens"):
        prepared.rows("b", "train", seq_len=2000, packing="concat")
    # Weights decide rows, not tokens.
    mixture[0]["weight"] = 1
    before = snapshot(prepared.folder)
    run(tmp_path, dataset="mixture", paths=[], mixture=mixture)
    assert snapshot(prepared.folder) == before


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_a_corpus_that_is_too_small_for_a_row(tmp_path: Path, fraction: float) -> None:
    write_corpus(tmp_path, 5)
    prepared = run(tmp_path, validation_fraction=fraction)
    total = prepared.tokens("train") + prepared.tokens("validation")
    most = total - 1 if not fraction else total // 2 - 1
    for packing in ("concat", "best_fit"):
        for part in ("train", "validation") if fraction else ("train",):
            assert prepared.rows("", part, seq_len=most, packing=packing).num_rows >= 1
            with pytest.raises(UserError, match=rf"training\.seq_len: the corpus has only {total} tokens") as caught:
                prepared.rows("", part, seq_len=most + 2, packing=packing)
            assert ("as many again to hold out" in str(caught.value)) == bool(fraction)


def test_what_is_there_and_right_is_left_alone(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    said: list[str] = []
    first = run(tmp_path, say=said.append)
    before = snapshot(tmp_path / "run")
    assert any("training a tokenizer" in line for line in said)
    said.clear()
    assert run(tmp_path, say=said.append) == first
    assert snapshot(tmp_path / "run") == before
    assert said == []


def flip(path: Path) -> None:
    """Change one bit; the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "shard cut short": lambda data: os.truncate(data / "train-00000.bin", 99),
    "bit of a shard": lambda data: flip(data / "train-00000.bin"),
    "bit of an index": lambda data: flip(data / "validation-00000.index"),
    "shard gone": lambda data: (data / "validation-00000.bin").unlink(),
    "manifest cut short": lambda data: os.truncate(data / "manifest.json", 99),
    "tokenizer cut short": lambda data: os.truncate(data / "tokenizer/tokenizer.json", 99),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_made_anew(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    write_corpus(tmp_path)
    prepared = run(tmp_path)
    before = snapshot(tmp_path / "run")
    damage(prepared.folder)
    run(tmp_path)
    times = re.compile(rb'"mtime_ns": \d+')
    after = {name: times.sub(b"", v[2]) for name, v in snapshot(tmp_path / "run").items()}
    assert after == {name: times.sub(b"", v[2]) for name, v in before.items()}


def new_tokenizer(folder: Path) -> None:
    save_tokenizer(folder / "hf", vocab_size=301)


CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "corpus": (lambda f: write_corpus(f, 410), {}, r"the corpus's files changed \(.*corpus.jsonl\)"),
    "one byte of the corpus": (lambda f: flip(f / "corpus.jsonl"), {}, r"files changed \(.*corpus.jsonl\)"),
    "tokenizer": (new_tokenizer, {}, "the tokenizer .*hf changed"),
    "shard": (lambda f: flip(f / "run/data/train-00000.bin"), {}, "train-00000.bin has changed"),
    "shard gone": (lambda f: (f / "run/data/train-00000.bin").unlink(), {}, "train-00000.bin is missing"),
    "tokenizer of the data": (
        lambda f: save_tokenizer(f / "run/data/tokenizer", vocab_size=299),
        {},
        "the tokenizer in .*data/tokenizer has changed",
    ),
    "vocab_size": (lambda f: None, {"vocab_size": 330}, r"model\.vocab_size \(or model\.flavor\) changed"),
    "fraction": (lambda f: None, {"validation_fraction": 0.5}, "data.validation_fraction changed"),
    "text_key": (lambda f: None, {"text_key": "body"}, r"data\.text_key changed"),
}


@pytest.mark.parametrize(("change", "settings", "reason"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("is_running", [False, True])
def test_a_change_is_prepared_anew_but_refused_once_there_is_a_checkpoint(
    tmp_path: Path, change: Callable[[Path], object], settings: dict[str, Any], reason: str, is_running: bool
) -> None:
    write_corpus(tmp_path)
    lines = [{"body": "y", **json.loads(line)} for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_tokenizer(tmp_path / "hf")
    options: dict[str, Any] = {"tokenizer": str(tmp_path / "hf")}
    run(tmp_path, **options)
    if is_running:
        (tmp_path / "run/checkpoint/step-5").mkdir(parents=True)
    change(tmp_path)
    options |= settings
    if is_running:
        before = snapshot(tmp_path)
        with pytest.raises(UserError, match=f"{reason} since this run began.*allow_changed_data"):
            run(tmp_path, **options)
        assert snapshot(tmp_path) == before
        options["allow_changed_data"] = True
    again = run(tmp_path, **options)
    fresh = run(tmp_path, name="fresh", **options)
    assert shards(again.folder) == shards(fresh.folder)
    assert again.problem() is None
    assert Tokenizer(tmp_path / "run/tokenizer").fingerprint == fresh.manifest["tokenizer_sha256"]


def test_the_runs_own_tokenizer_must_stay_as_it_is(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    run(tmp_path)
    (tmp_path / "run/checkpoint/step-5").mkdir(parents=True)
    save_tokenizer(tmp_path / "run/tokenizer")
    with pytest.raises(UserError, match="the tokenizer has changed since this run began"):
        run(tmp_path)
    prepared = run(tmp_path, allow_changed_data=True)
    assert Tokenizer(tmp_path / "run/tokenizer").fingerprint == prepared.manifest["tokenizer_sha256"]


def test_sources_may_be_deleted_or_touched(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    run(tmp_path)
    (tmp_path / "run/checkpoint/step-5").mkdir(parents=True)
    before = snapshot(tmp_path / "run")
    os.utime(tmp_path / "corpus.jsonl", ns=(1, 1))
    run(tmp_path)
    after = snapshot(tmp_path / "run")
    assert {name for name in before if before[name] != after[name]} == {"data/manifest.json"}  # the time of change
    run(tmp_path)
    (tmp_path / "corpus.jsonl").unlink()
    prepared = run(tmp_path)
    assert snapshot(tmp_path / "run") == after
    assert prepared.rows("", "train", seq_len=16, packing="concat").num_rows > 10


def test_other_paths_are_noticed_where_files_cannot_be_looked_at(tmp_path: Path) -> None:
    """Those of a server are not asked for again, and a pattern that matches nothing has no files to compare."""
    write_corpus(tmp_path)
    (tmp_path / "other.jsonl").write_text('{"text": "something else entirely"}\n' * 500)
    urls = [f"file://{tmp_path}/{name}.jsonl" for name in ("corpus", "other")]
    before = run(tmp_path, name="remote", paths=urls[:1])
    assert run(tmp_path, name="remote", paths=urls[:1]).fingerprint("") == before.fingerprint("")
    assert run(tmp_path, name="remote", paths=urls[1:]).fingerprint("") != before.fingerprint("")
    (tmp_path / "remote/checkpoint/step-5").mkdir(parents=True)
    with pytest.raises(UserError, match=r"data\.paths changed since this run began"):
        run(tmp_path, name="remote", paths=urls[:1])
    run(tmp_path)
    with pytest.raises(UserError, match=r"data\.paths: no file matches"):
        run(tmp_path, paths=[str(tmp_path / "corpsu.jsonl")])


def test_a_streamed_corpus_has_a_row_held_out_however_small_its_share(tmp_path: Path) -> None:
    write_corpus(tmp_path, 2000)
    corpus = f'dataset = "files", paths = ["{tmp_path}/corpus.jsonl"]'
    (tmp_path / "config.toml").write_text(f"""
        [data]
        dataset = "mixture"
        streaming = true
        mixture = [{{name = "much", weight = 98, {corpus}}}, {{name = "little", weight = 2, {corpus}}}]
        [training]
        seq_len = 256
        global_batch_size = 4
        local_batch_size = 4
        [validation]
        steps = 1
        """)
    options = ["--job.dump_folder", str(tmp_path / "run"), "--model.vocab_size", "400"]
    config = load_config(tmp_path / "config.toml", options, world_size=1)
    prepared = CorpusStore.of(config).get(say=lambda _: None)
    rows = {name: prepared.rows(name, "validation", seq_len=256, packing="concat").num_rows for name in prepared.names}
    assert rows["little"] >= 1
    assert rows["much"] >= 4


@pytest.mark.parametrize("place", ["corpora", "corpora.tmp", "run/tokenizer"])
def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path, place: str) -> None:
    write_corpus(tmp_path)
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "precious.txt").touch()
    if place == "corpora":
        (tmp_path / place / "manifest.json").write_text('{"name": "something else"}')
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="is not a prepared corpus"):
        run(tmp_path, prepared_folder=str(tmp_path / "corpora"))
    assert snapshot(tmp_path) == before


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "corpora").symlink_to(tmp_path / "disk")
    run(tmp_path, prepared_folder=str(tmp_path / "corpora"))
    assert (tmp_path / "corpora").is_symlink()
    assert (tmp_path / "disk/manifest.json").exists()


@pytest.mark.parametrize("in_the_first", ['{"other": "no text"}', '{"text": ""}'], ids=["bad", "empty"])
def test_too_many_bad_documents_in_units_that_are_under_way_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_the_first: str
) -> None:
    monkeypatch.setattr(tokenize, "_ALONE", 0)
    monkeypatch.setattr(tokenize, "_in_processes", lambda *_, **__: {})  # all were told to stop before they were done
    monkeypatch.setattr(tokenize, "plan_units", lambda files: [[(number, None)] for number in range(len(files))])
    for number in range(2):
        lines = ['{"other": "no text"}' if number else in_the_first] * 300 + [
            json.dumps({"text": f"{number} {i} one two"}) for i in range(300)
        ]
        with gzip.open(tmp_path / f"{number}.jsonl.gz", "wt") as file:
            file.write("\n".join(lines))
    with pytest.raises(UserError, match=r"documents cannot be read, and data\.max_bad_documents is 100"):
        run(tmp_path, paths=[str(tmp_path / "*.gz")], processes=2)
    assert (tmp_path / "run/data_errors.jsonl").exists()


def test_what_a_tokenizer_cuts_or_pads_for_others_is_not_cut_or_padded_here(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path)
    save_tokenizer(tmp_path / "hf")
    expected = [Tokenizer(tmp_path / "hf").encode(text) for text in texts]
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "hf/tokenizer.json"))
    assert [Tokenizer(tmp_path / "hf").encode(text) for text in texts] == expected
    assert [ids.tolist() for ids in Tokenizer(tmp_path / "hf").encode_batch(texts)] == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_best_fit_divides_documents_at_an_end_of_text_too(tmp_path: Path, streaming: bool) -> None:
    """As files are that several documents were joined into."""
    texts = [f"{i} " + " ".join(WORDS[(i * k) % 10] for k in range(1, 6)) for i in range(400)]
    (tmp_path / "joined.txt").write_text("<|endoftext|>".join(texts))
    (tmp_path / "config.toml").write_text(f"""
        [data]
        dataset = "files"
        paths = ["{tmp_path}/joined.txt"]
        packing = "best_fit"
        {"streaming = true" if streaming else ""}
        [training]
        seq_len = 64
        global_batch_size = 4
        local_batch_size = 4
        [validation]
        enable = false
        """)
    options = ["--job.dump_folder", str(tmp_path / "run"), "--model.vocab_size", "400"]
    config = load_config(tmp_path / "config.toml", options, world_size=1)
    store = CorpusStore.of(config)
    prepared = store.get(say=lambda _: None)
    if streaming:
        (corpus,) = store.streamed(prepared)
        stream = Stream(0, [corpus], [1.0], None, num_streams=1, tokenizer=Tokenizer(prepared.tokenizer),
                        packing="best_fit", seq_len=64, seed=0)  # fmt: skip
        rows = Rows.join([stream.row()[0] for _ in range(20)])
    else:
        source = prepared.rows("", "train", seq_len=64, packing="best_fit")
        rows = source.rows(np.arange(source.num_rows))
    real = rows.labels != -100
    begins = np.diff(rows.documents, axis=1, prepend=-1) > 0
    assert ((rows.inputs == prepared.manifest["end_of_text"]) & real == begins & real).all()
    assert (begins & real).sum() > 50


def test_a_copied_folder_is_as_good(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    prepared = run(tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").rglob("*.bin"):
        os.utime(path, ns=(1, 1))
    said: list[str] = []
    copy = run(tmp_path, name="copy", say=said.append)
    assert said == []
    assert copy.manifest == prepared.manifest


def test_preparing_beforehand_leaves_the_dump_folder_alone(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    run(tmp_path, prepared_folder=str(tmp_path / "corpora"), for_run=False)
    assert not (tmp_path / "run").exists()
    run(tmp_path, name="other", for_run=False)  # there is no other place for it
    assert (tmp_path / "other/tokenizer/tokenizer.json").exists()


def test_other_data_is_read_with_the_tokenizer_that_the_model_knows(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    before = run(tmp_path)
    (tmp_path / "run/checkpoint/step-5").mkdir(parents=True)
    (tmp_path / "corpus.jsonl").write_text('{"text": "something else entirely"}\n' * 500)
    after = run(tmp_path, allow_changed_data=True)
    assert after.manifest["tokenizer_sha256"] == before.manifest["tokenizer_sha256"]
    assert after.fingerprint("") != before.fingerprint("")


def test_what_is_prepared_for_others_has_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    before = run(tmp_path)
    (tmp_path / "run/checkpoint/step-5").mkdir(parents=True)
    (tmp_path / "corpus.jsonl").write_text('{"text": "something else entirely"}\n' * 500)
    shared = run(tmp_path, prepared_folder=str(tmp_path / "corpora"), for_run=False)
    alone = run(tmp_path, name="alone")
    assert shared.manifest["tokenizer_sha256"] == alone.manifest["tokenizer_sha256"]
    assert shared.manifest["tokenizer_sha256"] != before.manifest["tokenizer_sha256"]


def test_a_prepared_folder_is_shared(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    shared: dict[str, Any] = {"prepared_folder": str(tmp_path / "deep/corpora")}
    run(tmp_path, name="a", **shared)
    before = snapshot(tmp_path / "deep")
    run(tmp_path, name="b", **shared)
    assert snapshot(tmp_path / "deep") == before
    for name in ("a", "b"):
        assert set(snapshot(tmp_path / name)) == {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    for other in ({"vocab_size": 330}, {"validation_fraction": 0.5}):
        with pytest.raises(UserError, match=r"data\.prepared_folder: .*changed since it was prepared; name another"):
            run(tmp_path, name="c", **shared, **other)
    write_corpus(tmp_path, 410)
    with pytest.raises(UserError, match=r"data\.prepared_folder: .*the corpus's files changed"):
        run(tmp_path, name="a", **shared)
    assert snapshot(tmp_path / "deep") == before
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("settings", [{}, {"prepared_folder": "PATH"}])
def test_what_somebody_else_has_in_the_folder_is_not_deleted(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_corpus(tmp_path)
    (tmp_path / "run/data").mkdir(parents=True)
    (tmp_path / "run/data/thesis.txt").write_text("mine")
    settings = {key: str(tmp_path / "run/data") for key in settings}
    with pytest.raises(UserError, match="run/data is not a prepared corpus"):
        run(tmp_path, **settings)
    assert (tmp_path / "run/data/thesis.txt").read_text() == "mine"


def broken_corpus(folder: Path) -> list[dict[str, Any]]:
    """Files with bad documents, and the list that there should be."""
    good = '{"text": "good one"}\n'
    (folder / "a.jsonl").write_bytes((good + "\n" + "{no\n" + good).encode() + b'{"text": "\xe9"}\n{"text": ""}\n')
    pq.write_table(pa.table({"text": ["x", "", "y" * 2000, "z"]}), folder / "b.parquet")
    (folder / "c.txt").write_bytes(b"caf\xe9")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress((good * 9).encode(), mtime=0)[:-9])
    names = [("a.jsonl", "line", 3), ("a.jsonl", "line", 5), ("a.jsonl", "line", 6), ("b.parquet", "row", 1)]
    names += [("b.parquet", "row", 2), ("c.txt", "byte", 0), ("d.jsonl.gz", "line", None)]
    return [{"file": str((folder / file).resolve()), kind: place} for file, kind, place in names]


def test_bad_documents_are_left_out_and_listed(tmp_path: Path) -> None:
    expected = broken_corpus(tmp_path)
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c.txt", "d.jsonl.gz")]
    options: dict[str, Any] = {"paths": paths, "max_document_bytes": 1000, "validation_fraction": 0.0}
    options["allow_lost_files"] = ["d.jsonl.gz"]
    said: list[str] = []
    prepared = run(tmp_path, **options, max_bad_documents=4, say=said.append)
    listed = [json.loads(line) for line in (tmp_path / "run/data_errors.jsonl").read_text().splitlines()]
    problems = [problem.pop("problem") for problem in listed]
    assert [listed[-1].pop("lost_rows"), listed[-1].pop("lost_bytes")] == [None, None]
    listed[-1]["line"] = None
    assert listed == expected
    for problem, part in zip(
        problems, ["not JSON", "not UTF-8", "empty", "empty", "2,000 bytes", "not UTF-8", "cut"], strict=True
    ):
        assert part in problem
    assert any("4 documents and 1 file cannot be read and are left out" in line for line in said)
    assert documents(prepared, "train")[:4] == ["good one", "good one", "x", "z"]

    with pytest.raises(UserError) as caught:
        run(tmp_path, name="new/run", **options, max_bad_documents=3)
    for part in (
        "4 documents cannot be read",
        "max_bad_documents is 3",
        "a.jsonl, line 3: not JSON",
        "data_errors.jsonl",
    ):
        assert part in str(caught.value)
    left = set(snapshot(tmp_path / "new"))
    assert {name for name in left if not name.startswith("run/data.tmp/")} == {"run/data_errors.jsonl"}
    # With the limit raised it goes on with what was done.
    said.clear()
    again = run(tmp_path, name="new/run", **options, max_bad_documents=5, say=said.append)
    assert again.fingerprint("") == prepared.fingerprint("")
    assert any("units are done" in line for line in said)
    shutil.rmtree(tmp_path / "new/run/data")
    # Mended: the list of the time before is gone.
    run(tmp_path, name="new/run", **options | {"paths": paths[:1]}, max_bad_documents=4)
    assert len((tmp_path / "new/run/data_errors.jsonl").read_text().splitlines()) == 3


def test_a_corpus_of_nothing_but_bad_documents(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"body": "x"}\n' * 3)
    with pytest.raises(
        UserError, match=r'the corpus is empty: none of its[^\0]*line 1: no text under "text"; it has body'
    ):
        run(tmp_path)
    assert [json.loads(x)["line"] for x in (tmp_path / "run/data_errors.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_token_past_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = write_corpus(tmp_path, 50)
    encode = Tokenizer.encode_batch

    def wrong(self: Tokenizer, batch: list[str]) -> list[np.ndarray]:
        found = zip(encode(self, batch), batch, strict=True)
        return [np.append(ids, ids.dtype.type(320)) if text == texts[7] else ids for ids, text in found]

    monkeypatch.setattr(Tokenizer, "encode_batch", wrong)
    prepared = run(tmp_path, validation_fraction=0.0)
    assert documents(prepared, "train") == [*texts[:7], *texts[8:]]
    [line] = (tmp_path / "run/data_errors.jsonl").read_text().splitlines()
    assert json.loads(line)["line"] == 8
    assert "token id 320 is not below model.vocab_size" in line


def large_corpus(folder: Path, megabytes: float) -> list[str]:
    """JSON lines, cut into units of a mebibyte; with blank and broken lines everywhere. Returns the good texts."""
    save_word_tokenizer(folder / "words")
    rng = np.random.default_rng(0)
    texts, size = [], 0
    with (folder / "corpus.jsonl").open("w") as file:
        while size < megabytes * 2**20:
            text = " ".join(MANY[i] for i in rng.integers(0, len(MANY), size=1000))
            texts.append(text)
            broken = "{broken\n" if len(texts) % 100 == 0 else ""
            size += file.write(json.dumps({"text": text}) + "\n" + "\n" * 300 + broken)
    return texts


def large_options(folder: Path) -> dict[str, Any]:
    return {"tokenizer": str(folder / "words"), "vocab_size": 1100, "max_bad_documents": 1000}


def test_units_line_numbers_and_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = large_corpus(tmp_path, 5)
    options = large_options(tmp_path)
    alone = run(tmp_path, **options)
    assert len(list(alone.folder.glob("train-*.bin"))) > 4
    assert Counter(documents(alone, "train") + documents(alone, "validation")) == Counter(texts)
    listed = [json.loads(line)["line"] for line in (tmp_path / "run/data_errors.jsonl").read_text().splitlines()]
    lines = (tmp_path / "corpus.jsonl").read_text().split("\n")
    assert listed == [number for number, line in enumerate(lines, start=1) if line == "{broken"]
    assert len(listed) > 5
    monkeypatch.setattr(tokenize, "_ALONE", 0)
    many = run(tmp_path, name="many", processes=2, **options)
    assert shards(many.folder) == shards(alone.folder)
    assert many.fingerprint("") == alone.fingerprint("")
    assert snapshot(tmp_path / "many")["data_errors.jsonl"][2] == snapshot(tmp_path / "run")["data_errors.jsonl"][2]


def test_units_of_a_parquet_file(tmp_path: Path) -> None:
    texts = large_corpus(tmp_path, 4)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=50, compression="none")
    options = large_options(tmp_path) | {"paths": [str(tmp_path / "a.parquet")], "validation_fraction": 0.0}
    prepared = run(tmp_path, **options)
    assert len(list(prepared.folder.glob("train-*.bin"))) > 2
    assert documents(prepared, "train") == texts


@contextlib.contextmanager
def preparing(folder: Path, name: str, processes: int) -> Any:
    """The command, in a process of its own."""
    values = {
        "job.dump_folder": folder / name,
        "model.vocab_size": 1100,
        "data.dataset": "files",
        "data.paths": folder / "corpus.jsonl",
        "data.tokenizer": folder / "words",
        "data.max_bad_documents": 1000,
        "training.seq_len": 64,
    }
    arguments = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "torchtitan_style", "prepare", "--processes", str(processes), *arguments]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(holds: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.003)
    return found


def children(parent: int) -> dict[int, bytes]:
    """Its processes, with their commands."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_bytes()
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_half_way_it_goes_on_where_it_was(tmp_path: Path) -> None:
    large_corpus(tmp_path, 18)  # more than is tokenized without processes
    staging = tmp_path / "run/data.tmp"
    with preparing(tmp_path, "run", 2) as process:
        wait_until(lambda: list(staging.glob("unit-*.json")))
        started = children(process.pid)
        assert len(started) >= 2
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), 20)
    finished = [path.stem.removeprefix("unit-") for path in staging.glob("unit-*.json")]
    assert 0 < len(finished) < 17
    before = {k: v for k, v in snapshot(staging).items() if k.split("-")[-1].partition(".")[0] in finished}
    said: list[str] = []
    prepared = run(tmp_path, processes=1, say=said.append, **large_options(tmp_path))
    assert f"{len(finished)} units are done" in said[0]
    after = snapshot(prepared.folder)
    kept = {k: v for k, v in before.items() if not k.startswith("unit-")}
    assert len(kept) == 4 * len(finished)
    assert {k: after[k] for k in kept} == kept
    whole = run(tmp_path, name="whole", processes=1, **large_options(tmp_path))
    assert shards(prepared.folder) == shards(whole.folder)
    assert not staging.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(60)
def test_a_process_that_is_killed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large_corpus(tmp_path, 15)  # so much that it is not done before the first report of progress
    monkeypatch.setattr(tokenize, "_ALONE", 0)
    killed: list[int] = []

    def kill(done: int, total: int, tokens: int) -> None:
        workers = [pid for pid, command in children(os.getpid()).items() if b"spawn_main" in command]
        if workers and not killed:
            os.kill(workers[0], signal.SIGKILL)
            killed.append(workers[0])

    config = Data(dataset="files", paths=[str(tmp_path / "corpus.jsonl")], tokenizer=str(tmp_path / "words"))
    with pytest.raises(RunError, match=r"a tokenizing process was killed, .*run the same command to resume"):
        prepare(
            config,
            tmp_path / "run",
            vocab_size=1100,
            say=lambda _: None,
            progress=kill,
            processes=2,
        )
    assert killed
    assert (tmp_path / "run/data.tmp/plan.json").exists()
    assert not [pid for pid, command in children(os.getpid()).items() if b"spawn_main" in command]


@pytest.mark.parametrize("changed", ["fraction", "tokenizer", "source"])
def test_what_was_half_made_of_something_else_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    large_corpus(tmp_path, 3)
    done = tokenize._tokenize_unit

    def stop(job: Any, number: int, *arguments: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        done(job, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "_tokenize_unit", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, **large_options(tmp_path))
    assert len(list((tmp_path / "run/data.tmp").glob("unit-*.json"))) == 2
    options = large_options(tmp_path) | {"validation_fraction": 0.5 if changed == "fraction" else 0.05}
    if changed == "tokenizer":
        save_tokenizer(tmp_path / "words")
    elif changed == "source":
        with (tmp_path / "corpus.jsonl").open("r+") as file:
            file.write('{"text": "' + WORDS[0])
    said: list[str] = []
    prepared = run(tmp_path, **options, say=said.append)
    assert not any("going on" in line for line in said)
    fresh = run(tmp_path, name="fresh", **options)
    assert shards(prepared.folder) == shards(fresh.folder)


def write_text(folder: Path, content: str) -> dict[str, Any]:
    (folder / "corpus.txt").write_text(content, encoding="utf-8")
    return {"paths": [str(folder / "corpus.txt")]}


def with_tokenizer(folder: Path, **settings: Any) -> dict[str, Any]:
    write_corpus(folder)
    save_tokenizer(folder / "hf", **settings)
    return {"tokenizer": str(folder / "hf")}


def not_a_tokenizer(folder: Path) -> dict[str, Any]:
    write_corpus(folder)
    (folder / "hf").mkdir()
    return {"tokenizer": str(folder / "hf")}


ERRORS: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "empty": (lambda f: write_text(f, ""), r"data\.paths: the corpus is empty: its files hold no text"),
    "missing": (lambda f: {"paths": [str(f / "corpus.txt")]}, r"data\.paths: no file matches"),
    "vocabulary too small": (
        lambda f: with_tokenizer(f, vocab_size=321),
        r"model\.vocab_size: 320 is too small .* up to 320; set model\.vocab_size to 384, or, if weights",
    ),
    "no end of text": (lambda f: with_tokenizer(f, eos=None), r"data\.tokenizer: .*neither <\|endoftext\|> nor"),
    "no such tokenizer folder": (
        lambda f: (write_corpus(f), {"tokenizer": str(f / "hf")})[1],
        r"data\.tokenizer: there is no folder",
    ),
    "folder without tokenizer": (not_a_tokenizer, r"data\.tokenizer: no tokenizer in .*: there is no tokenizer\.json"),
}


@pytest.mark.parametrize(("make", "message"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("shared", [False, True])
def test_a_mistake_leaves_nothing_behind(
    tmp_path: Path, make: Callable[[Path], dict[str, Any]], message: str, shared: bool
) -> None:
    settings = make(tmp_path)
    if shared:
        settings["prepared_folder"] = str(tmp_path / "other/deep/corpora")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=message):
        run(tmp_path, name="new/folders/run", **settings)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "other").exists()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("file", ["run", "run/data.tmp", "run/data"])
def test_a_file_in_the_way_is_a_user_error(tmp_path: Path, file: str) -> None:
    write_corpus(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    with pytest.raises(UserError, match=r"cannot be written: |is not a prepared corpus"):
        run(tmp_path)
    assert (tmp_path / file).read_text() == "mine"


def test_a_hugging_face_tokenizer_is_used_as_it_is(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path)
    backend = save_tokenizer(tmp_path / "hf")
    prepared = run(tmp_path, tokenizer=str(tmp_path / "hf"), validation_fraction=0.0)
    end = backend.token_to_id("</s>")
    expected = [i for text in texts for i in (*backend.encode(text, add_special_tokens=False).ids, end)]
    assert token_ids(prepared, "train").tolist() == expected


MIXTURE = '[data]\ndataset = "mixture"\n'
ENTRY = '[[data.mixture]]\nname = "a"\n'
STREAMED = "[data]\nstreaming = true\n[validation]\nenable = false\n"
CONFIG_ERRORS: dict[str, tuple[str, str, list[str]]] = {
    "near": ('[data]\ndataset = "fils"', "data.dataset", ['owner/name", not "fils"; did you mean files?']),
    "mixture without entries": ('[data]\ndataset = "mixture"', "data.mixture", ["needs corpora", "[[data.mixture]]"]),
    "entries without mixture": (f"[data]\n{ENTRY}", "data.dataset", ['only read with dataset = "mixture"', "stdlib"]),
    "two of one name": (MIXTURE + ENTRY + ENTRY, "data.mixture", ['two corpora have the name "a"']),
    "mixture in a mixture": (MIXTURE + ENTRY + 'dataset = "mixture"', "data.mixture", ["a: a mixture cannot be part"]),
    "entry without paths": (MIXTURE + ENTRY + 'dataset = "files"', "data.mixture", ["a: paths: ", "needs the files"]),
    "entry's key": (MIXTURE + ENTRY + "wieght = 2", "data.mixture", ["entry 1: unknown key wieght", "mean weight?"]),
    "entry without name": (f"{MIXTURE}[[data.mixture]]\nweight = 2", "data.mixture", ["entry 1: name is missing"]),
    "no weight": (MIXTURE + ENTRY + "weight = 0", "data.mixture", ["entry 1: weight"]),
    "name": (f'{MIXTURE}[[data.mixture]]\nname = "a/b"', "data.mixture", ["name must be letters", '"a/b"']),
    "name that leads away": (f'{MIXTURE}[[data.mixture]]\nname = ".."', "data.mixture", ["name must be", '".."']),
    "name that is taken": (f'{MIXTURE}[[data.mixture]]\nname = "tokenizer"', "data.mixture", ["is taken"]),
    "subset of files": ('[data]\nsubset = "x"', "data.subset", ['dataset of the Hub, not "stdlib"']),
    "split of files": ('[data]\nsplit = "x"', "data.split", ['dataset of the Hub, not "stdlib"']),
    "paths of a dataset": ('[data]\ndataset = "a/b"\npaths = ["x"]', "data.dataset", ["paths is only read", "a/b"]),
    "streams without streaming": ("[data]\nnum_streams = 4", "data.num_streams", ["only read with data.streaming"]),
    "folder of a stream": (STREAMED.replace("[v", 'prepared_folder = "x"\n[v'), "data.prepared_folder", ["not used"]),
    "streams and rows": (STREAMED.replace("[v", "num_streams = 3\n[v"), "data.num_streams", ["cannot fill 8 rows"]),
    "packing": ('[data]\npacking = "bestfit"', "data.packing", ["concat, best_fit", "did you mean best_fit?"]),
}


@pytest.mark.parametrize(("toml", "key", "parts"), CONFIG_ERRORS.values(), ids=CONFIG_ERRORS)
def test_mistakes_in_the_configuration(tmp_path: Path, toml: str, key: str, parts: list[str]) -> None:
    (tmp_path / "c.toml").write_text(toml)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "c.toml")
    for part in (f"c.toml: {key}: ", *parts):
        assert part in str(caught.value)


def test_the_numbers_of_ranks_that_fit_the_streams_are_named(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        STREAMED.replace("[v", "num_streams = 4\n[v") + "[training]\nlocal_batch_size = 4\n"
    )
    load_config(tmp_path / "c.toml", world_size=4)
    with pytest.raises(UserError, match=r"4 streams cannot be shared out evenly over 8 .*ranks fit: 1, 2, 4$"):
        load_config(tmp_path / "c.toml", world_size=8)
