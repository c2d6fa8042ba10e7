"""A corpus becomes token files and a tokenizer, once; a mistake leaves nothing behind."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers

from torchtitan_style.config.schema import Data
from torchtitan_style.data.prepare import PreparedData, prepare
from torchtitan_style.data.tokenizer import END_OF_TEXT
from torchtitan_style.errors import UserError

SCRIPTS = {
    "code": "def f(x):\n\treturn {'a': x ** 2}  # 0x1F\n",
    "whitespace": "  two  \t\ttabs\r\n\r\n\n   end ",
    "Latin": "Straße, naïve, Łódź, e\u0301 (decomposed), ﬁ",
    "Greek, Cyrillic": "Ελληνικά, русский, українська",
    "right to left": "العربية, עברית, فارسی",
    "Indic": "हिन्दी, தமிழ், বাংলা",
    "East Asian": "日本語のテキスト、中文，한국어",
    "emoji": "🙂👩‍👩‍👧🏽🇺🇳 ❤️",
    "control": "\x00\x01\x7f\ufeff\u200b",
    "beyond the BMP": "𝔘𝔫𝔦 𒀀 𐍈",
}


def write_corpus(folder: Path, count: int = 400) -> list[str]:
    """``count`` different documents, one in ten of them twice."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    texts = [f"{i}: " + " ".join(words[(i * k) % 10] for k in range(1, 8)) for i in range(count)]
    texts += texts[::10]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
    return texts


def run(folder: Path, *, vocab_size: int = 320, seq_len: int = 16, say=lambda _: None, **settings: Any) -> PreparedData:
    """Prepare ``folder``/run from ``folder``/corpus.jsonl."""
    config = Data(**({"dataset": "files", "paths": [str(folder / "corpus.jsonl")]} | settings))
    return prepare(config, folder / "run", vocab_size=vocab_size, seq_len=seq_len, say=say)


def token_ids(folder: Path, part: str) -> np.ndarray:
    """Token ids, in the type that the manifest names."""
    manifest = json.loads((folder / "run/data/manifest.json").read_text(encoding="utf-8"))
    ids = np.fromfile(folder / f"run/data/{part}.bin", dtype=manifest["dtype"])
    assert len(ids) == manifest[f"{part}_tokens"]
    return ids


def documents(folder: Path, part: str) -> list[str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "run/tokenizer")
    ids = token_ids(folder, part)
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    assert not len(ids) or ends[-1] == len(ids) - 1
    return [tokenizer.decode(document[:-1]) for document in np.split(ids, ends + 1)[:-1]]


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file with its inode, time and content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


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
    backend.train_from_iterator(["one two three four five six seven eight nine ten"] * 9, trainer)
    backend.add_tokens([f"<{i}>" for i in range(vocab_size - backend.get_vocab_size())])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos).save_pretrained(folder)
    return backend


def test_files_are_there_as_documented(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    prepared = run(tmp_path)
    assert set(snapshot(tmp_path / "run")) == {
        "data/manifest.json",
        "data/train.bin",
        "data/validation.bin",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }
    manifest = json.loads((tmp_path / "run/data/manifest.json").read_text(encoding="utf-8"))
    assert PreparedData(**manifest) == prepared
    assert prepared.documents == 440
    assert prepared.settings["seq_len"] == 16


def test_every_document_is_on_one_side_once_and_its_copies_too(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path)
    run(tmp_path, validation_fraction=0.25)
    train, held_out = documents(tmp_path, "train"), documents(tmp_path, "validation")
    assert Counter(train) + Counter(held_out) == Counter(texts)
    assert not set(train) & set(held_out)
    assert train == [text for text in texts if text in set(train)]  # in the corpus's order
    # Documents fall on a side independently: within 5 standard deviations of the share asked for.
    assert abs(len(set(held_out)) - 100) < 5 * math.sqrt(400 * 0.25 * 0.75)


@pytest.mark.parametrize("fraction", [0.1, 0.5])  # its hash says 0.17: to train on, then to hold out
def test_a_single_document_holds_out_its_end(tmp_path: Path, fraction: float) -> None:
    text = " ".join(map(str, range(2001)))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    run(tmp_path, paths=[str(tmp_path / "book.txt")], validation_fraction=fraction)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/tokenizer")
    train, held_out = token_ids(tmp_path, "train"), token_ids(tmp_path, "validation")
    whole = [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert [*train, *held_out] == whole
    assert len(held_out) == int(fraction * len(whole))


def test_too_few_held_out_documents_are_replaced_by_the_end_of_the_corpus(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path, 20)
    run(tmp_path, seq_len=8)
    assert 9 <= len(token_ids(tmp_path, "validation")) < 65  # enough for short rows only
    run(tmp_path, seq_len=64)
    held_out = token_ids(tmp_path, "validation")
    assert len(held_out) == 65
    whole = [*token_ids(tmp_path, "train"), *held_out]
    decoded = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/tokenizer").decode(whole)
    assert Counter(decoded.split(END_OF_TEXT)) == Counter([*texts, ""])


def test_nothing_is_held_out_if_not_asked_for(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path)
    run(tmp_path, validation_fraction=0.0)
    assert documents(tmp_path, "train") == texts
    assert len(token_ids(tmp_path, "validation")) == 0


def test_large_vocabularies_take_four_bytes_a_token(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path)
    assert run(tmp_path, vocab_size=2**16).dtype == "<u2"
    assert run(tmp_path, vocab_size=2**16 + 1, validation_fraction=0.0).dtype == "<u4"
    assert documents(tmp_path, "train") == texts


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


@pytest.mark.parametrize("name", ["data/train.bin", "data/manifest.json", "tokenizer/tokenizer.json"])
def test_what_is_cut_short_is_made_anew(tmp_path: Path, name: str) -> None:
    write_corpus(tmp_path)
    run(tmp_path)
    before = snapshot(tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(before[name][2][:-9])
    run(tmp_path)
    assert {k: v[2] for k, v in snapshot(tmp_path / "run").items()} == {k: v[2] for k, v in before.items()}


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "corpus": ({}, "the corpus's files changed"),
    "vocab_size": ({"vocab_size": 330}, r"model\.vocab_size \(or model\.flavor\) changed"),
    "seq_len": ({"seq_len": 20}, "training.seq_len changed"),
    "validation_fraction": ({"validation_fraction": 0.5}, "data.validation_fraction changed"),
}


@pytest.mark.parametrize(("changed", "_reason"), CHANGES.values(), ids=CHANGES)
def test_it_is_made_anew_when_something_changed(tmp_path: Path, changed: dict[str, Any], _reason: str) -> None:
    write_corpus(tmp_path)
    first = run(tmp_path)
    if not changed:
        write_corpus(tmp_path, 410)
    second = run(tmp_path, **changed)
    assert second.fingerprint != first.fingerprint
    again = tmp_path / "again"
    again.mkdir()
    (tmp_path / "corpus.jsonl").rename(again / "corpus.jsonl")
    fresh = run(again, **changed)
    for part in ("train", "validation"):
        assert np.array_equal(token_ids(tmp_path, part), token_ids(again, part))
    assert fresh.corpus_sha256 == second.corpus_sha256


@pytest.mark.parametrize(("changed", "reason"), CHANGES.values(), ids=CHANGES)
def test_nothing_may_change_once_there_is_a_checkpoint(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    write_corpus(tmp_path)
    run(tmp_path)
    (tmp_path / "run/checkpoint/step-5").mkdir(parents=True)
    before = snapshot(tmp_path / "run")
    if not changed:
        write_corpus(tmp_path, 410)
    with pytest.raises(UserError, match=f"{reason} since this run began"):
        run(tmp_path, **changed)
    assert snapshot(tmp_path / "run") == before


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


def half_a_surrogate_pair(folder: Path) -> dict[str, Any]:
    write_corpus(folder)
    with (folder / "corpus.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "\\ud83d"}\n')  # valid JSON, but no Unicode text
    return {}


ERRORS: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "shorter than a row": (lambda f: write_text(f, "short"), r"training\.seq_len: the corpus has only \d+ tokens"),
    "nothing to train on beside a row held out": (
        lambda f: write_text(f, " ".join("abcdefghijkl")),  # 24 tokens: more than a row of 17, less than two
        r"training\.seq_len: .* and as many again to hold out",
    ),
    "empty": (lambda f: write_text(f, ""), r"data\.paths: the corpus is empty"),
    "missing": (lambda f: {"paths": [str(f / "corpus.txt")]}, r"data\.paths: no file matches"),
    "no text": (half_a_surrogate_pair, r"data\.paths: .*corpus\.jsonl, line 441"),
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
def test_a_mistake_leaves_nothing_behind(tmp_path: Path, make: Callable[[Path], dict[str, Any]], message: str) -> None:
    settings = make(tmp_path)
    before = snapshot(tmp_path)
    config = Data(**({"dataset": "files", "paths": [str(tmp_path / "corpus.jsonl")]} | settings))
    with pytest.raises(UserError, match=message):
        prepare(config, tmp_path / "new/folders/run", vocab_size=320, seq_len=16, say=lambda _: None)
    assert not (tmp_path / "new").exists()
    assert snapshot(tmp_path) == before


def test_a_mistake_leaves_the_files_of_an_earlier_preparation(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    run(tmp_path)
    before = snapshot(tmp_path / "run")
    with pytest.raises(UserError, match="seq_len"):
        run(tmp_path, seq_len=10**6)
    assert snapshot(tmp_path / "run") == before
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"data", "tokenizer"}


@pytest.mark.parametrize("file", ["run", "run/data.tmp"])
def test_a_file_in_the_way_is_a_user_error(tmp_path: Path, file: str) -> None:
    write_corpus(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    with pytest.raises(UserError, match=r"job\.dump_folder: cannot write to "):
        run(tmp_path)
    assert (tmp_path / file).read_text() == "mine"


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_transformers_reads_the_trained_tokenizer_and_agrees(text: str, trained: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "run/tokenizer")
    ids = token_ids(trained, "train").tolist()
    expected = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    assert ",".join(map(str, expected)) in ",".join(map(str, ids))
    assert tokenizer.decode(expected[:-1]) == text
    assert len(tokenizer) <= 320
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END_OF_TEXT, 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on ``SCRIPTS``."""
    folder = tmp_path_factory.mktemp("trained")
    lines = [json.dumps({"text": text}) + "\n" for text in SCRIPTS.values()]
    (folder / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
    run(folder, validation_fraction=0.0)
    return folder


def test_a_hugging_face_tokenizer_is_used_as_it_is(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path)
    backend = save_tokenizer(tmp_path / "hf")
    run(tmp_path, tokenizer=str(tmp_path / "hf"), validation_fraction=0.0)
    end = backend.token_to_id("</s>")
    expected = [i for text in texts for i in (*backend.encode(text, add_special_tokens=False).ids, end)]
    assert token_ids(tmp_path, "train").tolist() == expected
