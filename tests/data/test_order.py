"""The rows of a step are a function of the seed and the step: whatever the ranks, the workers and the resumes.

Shown for prepared and streamed corpora, mixtures and both packings, by real ranks and real workers.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tomli_w

from tests.data.corpora import prepare, streamed_corpora, texts, write_jsonl, write_parquet
from torchtitan_style.config.layout import plan_streams
from torchtitan_style.config.schema import Data
from torchtitan_style.data.encode import is_held_out
from torchtitan_style.data.loader import PreparedSteps, StreamedSteps
from torchtitan_style.data.rows import NO_LABEL, Rows, row_order
from torchtitan_style.data.streams import Stream
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer

PHASES = [(1, 0), (2, 2), (4, 0), (1, 1)]
"""Ranks and workers from one resume to the next. Each rank that has workers imports torch once more for them."""
STEPS = 3
"""Steps of a phase."""
SEQ_LEN = 48

MANY = {"paths": ["many/*.jsonl"]}  # a file and more for each stream
FEW = {"paths": ["few/*"]}  # streams share files
CHAT = {"paths": ["chat/*.jsonl"], "format": "chat"}
VARIANTS: dict[str, dict[str, Any]] = {
    "concat": FEW,
    "best_fit": FEW | {"packing": "best_fit"},
    "stream": MANY | {"streaming": True},
    "stream_best_fit": FEW | {"streaming": True, "packing": "best_fit", "num_streams": 4},
    "stream_chat": CHAT | {"streaming": True, "num_streams": 4},
    "chat_mixture": {"mixture": [{"name": "a", "weight": 1, **CHAT}, {"name": "b", "weight": 1, **FEW}]},
    "mixture": {"mixture": [{"name": "a", "weight": 3, **MANY}, {"name": "b", "weight": 1.5, **FEW}]},
    "stream_mixture": {
        "streaming": True,
        "mixture": [{"name": "a", "weight": 1, **MANY}, {"name": "b", "weight": 2, **FEW}],
    },
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "many").mkdir()
    (folder / "few").mkdir()
    for number in range(11):
        write_jsonl(folder / f"many/{number}.jsonl", texts(40 + 10 * number, seed=number))
    (folder / "chat").mkdir()
    for number in range(3):
        said = texts(300, seed=200 + number, longest=6)
        rows = [{"messages": messages(said[at : at + 2 + at % 4])} for at in range(0, 300, 6)]
        (folder / f"chat/{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_jsonl(folder / "few/plain.jsonl", texts(500, seed=100))
    write_jsonl(folder / "few/zipped.jsonl.gz", texts(500, seed=101, longest=200))
    write_parquet(folder / "few/table.parquet", texts(500, seed=102))
    return folder


def messages(said: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]


def data_section(corpus: Path, variant: dict[str, Any]) -> dict[str, Any]:
    def absolute(entry: dict[str, Any]) -> dict[str, Any]:
        paths = [str(corpus / path) for path in entry.get("paths", [])]
        return entry | ({"dataset": "files", "paths": paths} if paths else {})

    section = absolute(variant)
    if "mixture" in variant:
        section |= {"dataset": "mixture", "mixture": [absolute(entry) for entry in variant["mixture"]]}
    return section


def test_batches_do_not_depend_on_ranks_workers_or_resumes(
    corpus: Path, tmp_path: Path, run_ranks: Callable[..., None]
) -> None:
    for folder in ("whole", "resumed"):
        (tmp_path / folder).mkdir()
        for name, variant in VARIANTS.items():
            config = {
                "job": {"dump_folder": str(tmp_path / "runs" / name)},
                "model": {"flavor": "debug"},
                "data": data_section(corpus, variant),
                "training": {"seq_len": SEQ_LEN, "global_batch_size": 8, "local_batch_size": -1, "seed": 5},
                "validation": {"steps": 1},
            }
            (tmp_path / folder / f"{name}.toml").write_text(tomli_w.dumps(config))
    script = Path(__file__).with_name("deal_batches.py")
    run_ranks(script, 1, tmp_path / "whole", STEPS * len(PHASES), 0, "begin")
    for number, (ranks, workers) in enumerate(PHASES):
        run_ranks(script, ranks, tmp_path / "resumed", STEPS, workers, "resume" if number else "begin")
    for name in VARIANTS:
        whole, resumed = (
            (tmp_path / folder / f"{name}.hashes").read_text().splitlines() for folder in ("whole", "resumed")
        )
        assert len(set(whole)) == STEPS * len(PHASES), f"{name}: every batch is another one"
        assert resumed == whole, name


# What is in the batches


@pytest.fixture(scope="module", params=["concat", "best_fit"])
def packing(request: pytest.FixtureRequest) -> str:
    return request.param


def documents_of(config: Data, *, held_out: bool) -> Counter[str]:
    """The corpus, read again without the code that is tested."""
    found: list[str] = []
    for pattern in config.paths:
        for path in sorted(Path(pattern).parent.glob(Path(pattern).name)):
            if path.suffix == ".parquet":
                found += pq.read_table(path)["text"].to_pylist()
            else:
                raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                found += [json.loads(line)["text"] for line in raw.decode().splitlines()]
    return Counter(text for text in found if is_held_out(text, config.validation_fraction) == held_out)


def predicted(rows: Rows) -> Iterator[list[int]]:
    """The label of each position that has one, by document: a document is what follows an end-of-text input."""
    for inputs, labels in zip(rows.inputs, rows.labels, strict=True):
        for token, label in zip(inputs.tolist(), labels.tolist(), strict=True):
            if label != NO_LABEL:
                yield [token, label]


def prepared(corpus: Path, tmp: Path, variant: dict[str, Any], **settings: Any) -> tuple[Data, Any, Tokenizer]:
    config = Data(**(data_section(corpus, variant) | settings))
    found = prepare(config, tmp / "run", vocab_size=512, say=lambda line: None)
    return config, found, Tokenizer(found.tokenizer)


def transitions(tokenizer: Tokenizer, documents: Counter[str]) -> Counter[tuple[int, int]]:
    """Each token of each document with the one before it, end-of-text being before the first and after the last."""
    pairs: Counter[tuple[int, int]] = Counter()
    for text, count in documents.items():
        ids = [tokenizer.end_of_text, *tokenizer.encode(text), tokenizer.end_of_text]
        for pair in itertools.pairwise(ids):
            pairs[pair] += count
    return pairs


def test_an_epoch_of_a_prepared_corpus_predicts_every_token_once(corpus: Path, tmp_path: Path, packing: str) -> None:
    config, found, tokenizer = prepared(corpus, tmp_path, FEW, packing=packing)
    source = found.rows("", "train", seq_len=SEQ_LEN, packing=packing)
    order = row_order(np.arange(source.num_rows), num_rows=source.num_rows, key="5")
    assert sorted(order) == list(range(source.num_rows))
    seen = Counter((token, label) for token, label in predicted(source.rows(order)))
    assert seen == transitions(tokenizer, documents_of(config, held_out=False))
    held = found.rows("", "validation", seq_len=SEQ_LEN, packing=packing)
    seen = Counter((token, label) for token, label in predicted(held.rows(np.arange(held.num_rows))))
    assert seen == transitions(tokenizer, documents_of(config, held_out=True))


@pytest.mark.parametrize("variant", [MANY, FEW], ids=["by file", "by example"])
def test_an_epoch_of_all_streams_has_every_document_once(
    corpus: Path, tmp_path: Path, packing: str, variant: dict[str, Any]
) -> None:
    config, found, tokenizer = prepared(corpus, tmp_path, variant, packing=packing, streaming=True)
    corpora = streamed_corpora(config, found, vocab_size=512)
    first_epoch: Counter[tuple[int, ...]] = Counter()
    for number in range(8):
        options: dict[str, Any] = {"num_streams": 8, "packing": packing, "seq_len": SEQ_LEN, "seed": 5}
        options["tokenizer"] = tokenizer
        stream = Stream(number, corpora, [1.0], None, **options)
        seen: Counter[tuple[int, int]] = Counter()
        rows = []
        while True:  # on to where no row holds a part of a document: somewhere in the second epoch
            rows.append(stream.row()[0])
            *cursor, used = stream.state["places"][0]
            if cursor[0] and used == 0:
                break
            if packing == "concat" and cursor[0]:
                break
        for row in rows:
            seen.update((token, label) for token, label in predicted(row))
        expected: Counter[tuple[int, int]] = Counter()
        for place, [(ids, _)] in stream.documents[0].read((0, 0, 0)):
            if place[0] == 0:
                first_epoch[tuple(ids.tolist())] += 1
            if place >= tuple(cursor):
                # concat: this many tokens of the document that the next row begins in, its end-of-text first
                begun = [tokenizer.end_of_text, *ids[:used].tolist()] if packing == "concat" else []
                expected.update(itertools.pairwise(begun))
                break
            expected.update(itertools.pairwise([tokenizer.end_of_text, *ids.tolist(), tokenizer.end_of_text]))
        assert seen == expected
    texts_of = documents_of(config, held_out=False)
    assert first_epoch == Counter({tuple(tokenizer.encode(text)): count for text, count in texts_of.items()})


def steps_of(source: PreparedSteps | StreamedSteps, state: dict[str, Any], count: int) -> list[Any]:
    (places,) = source.share(0, 1, 1)
    reading = source.steps(state, places)
    return [next(reading) for _ in range(count)]


def test_a_mixture_has_its_shares_and_each_corpus_goes_on_by_itself(corpus: Path, tmp_path: Path) -> None:
    config, found, _ = prepared(corpus, tmp_path, VARIANTS["mixture"])
    sources = [found.rows(name, "train", seq_len=SEQ_LEN, packing="concat") for name in found.names]
    steps = PreparedSteps(sources, found.names, config.weights(), global_batch=8, seed=5)
    parts = steps_of(steps, {}, 60)
    counts = np.bincount(np.concatenate([part.corpora for part in parts]))
    assert np.abs(counts - 480 * np.array([2 / 3, 1 / 3])).max() <= 3
    for corpus_number, name in enumerate(found.names):
        source = sources[corpus_number]
        rows = np.concatenate([part.rows.inputs[part.corpora == corpus_number] for part in parts])
        order = row_order(np.arange(len(rows)), num_rows=source.num_rows, key=f"5/{name}")
        np.testing.assert_array_equal(rows, source.rows(order).inputs)


def test_streams_go_on_into_the_next_epoch_in_another_order(corpus: Path, tmp_path: Path) -> None:
    config, found, _ = prepared(corpus, tmp_path, MANY, streaming=True)
    corpora = streamed_corpora(config, found, vocab_size=512)
    steps = StreamedSteps(corpora, [1.0], global_batch=2, num_streams=2, packing="concat", seq_len=SEQ_LEN, seed=5)
    epochs: dict[int, list[tuple[int, int]]] = {}
    for part in steps_of(steps, {}, 1500):
        epoch, place, record, _ = part.state["0"]["places"][0]
        epochs.setdefault(epoch, []).append((place, record))
    assert len(epochs) >= 3
    first_files = {deal_order(corpora[0], epoch) for epoch in range(6)}
    assert len(first_files) > 1


def deal_order(corpus: Any, epoch: int) -> tuple[int, ...]:
    from torchtitan_style.data.rows import permute

    files = corpus.deal(2)[0]
    return tuple(permute(np.arange(len(files)), size=len(files), key=f"5/{corpus.name}/0/{epoch}"))


@pytest.mark.parametrize(
    ("num_streams", "global_batch", "dp", "said"),
    [
        (-1, 8, 4, 8),
        (-1, 96, 3, 48),
        (-1, 7, 1, 7),
        (4, 8, 2, 4),
        (4, 8, 8, "1, 2, 4"),
        (3, 8, 1, "1, 2, 4, 8"),
        (6, 12, 4, "1, 2, 3, 6"),
    ],
)
def test_streams_that_do_not_fit_say_what_does(num_streams: int, global_batch: int, dp: int, said: int | str) -> None:
    config = Data(num_streams=num_streams)
    if isinstance(said, int):
        assert plan_streams(config, global_batch, dp) == said
    else:
        with pytest.raises(ValueError, match=said):
            plan_streams(config, global_batch, dp)
