"""Both packings against their definitions, written plainly."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from torchtitan_style.data.packing import Piece, best_fit, pieces_of
from torchtitan_style.data.prepare.prepared import Prepared
from torchtitan_style.data.rows import ConcatRows, Rows
from torchtitan_style.data.shards import TokenShards

END = 0


def plainly(pieces: list[Piece], capacity: int) -> list[list[Piece]]:
    """Best-fit decreasing: every row is looked at for every piece."""
    rows: list[list[int]] = []
    for index, piece in sorted(enumerate(pieces), key=lambda item: (-item[1].pairs, item[0])):
        rooms = [(capacity - sum(pieces[i].pairs for i in row), number) for number, row in enumerate(rows)]
        fitting = [(room, number) for room, number in rooms if room >= piece.pairs]
        if fitting:
            rows[min(fitting)[1]].append(index)
        else:
            rows.append([index])
    return [[pieces[i] for i in sorted(row)] for row in sorted(rows, key=min)]


def documents(seed: int, count: int, longest: int) -> list[int]:
    rng = random.Random(seed)
    return [min(longest, int(rng.paretovariate(0.7))) for _ in range(count)]


@pytest.mark.parametrize("capacity", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_best_fit_is_best_fit_decreasing(seed: int, capacity: int) -> None:
    lengths = documents(seed, 150, 3 * capacity)
    pieces: list[Piece] = []
    for start, pairs in zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False):
        pieces += pieces_of(start, pairs, capacity)
    rows = best_fit(pieces, capacity)
    assert rows == plainly(pieces, capacity)
    assert Counter(piece for row in rows for piece in row) == Counter(pieces)
    assert all(0 < sum(piece.pairs for piece in row) <= capacity for row in rows)


@pytest.mark.parametrize(("pairs", "sizes"), [(1, [1]), (9, [9]), (10, [10]), (11, [10, 1]), (30, [10] * 3)])
def test_only_what_is_longer_than_a_row_is_cut(pairs: int, sizes: list[int]) -> None:
    pieces = pieces_of(100, pairs, 10)
    assert [piece.pairs for piece in pieces] == sizes
    assert [i for piece in pieces for i in range(piece.start, piece.start + piece.pairs)] == list(
        range(100, 100 + pairs)
    )


def test_nothing_to_pack() -> None:
    assert best_fit([], 10) == []


def prepared(folder: Path, parts: dict[str, list[list[int]]], fraction: float) -> tuple[Prepared, list[int]]:
    """A prepared folder with shards of these documents' lengths, and all of its tokens; ids count up from 1."""
    files, tokens, everything = {}, {}, []
    ids = iter(range(1, 10**6))
    for part, shards in parts.items():
        tokens[part] = 0
        for number, lengths in enumerate(shards):
            content = [END] if number == 0 else []
            for length in lengths:
                content += [*(next(ids) for _ in range(length)), END]
            np.array(content, "<u4").tofile(folder / f"{part}-{number:05d}.bin")
            np.array([length + 1 for length in lengths], "<u4").tofile(folder / f"{part}-{number:05d}.index")
            for name in (f"{part}-{number:05d}.bin", f"{part}-{number:05d}.index"):
                files[name] = {"size": (folder / name).stat().st_size, "sha256": name}
            tokens[part] += len(content)
            everything += content
    manifest = {
        "dtype": "<u4",
        "end_of_text": END,
        "settings": {"validation_fraction": fraction, "streaming": False, "corpora": {"": {"text_key": "text"}}},
        "corpora": {"": {"files": files, "tokens": tokens, "sources": []}},
    }
    return Prepared(folder, manifest), everything


def predictions(rows: Rows) -> Counter[tuple[int, int]]:
    """Pairs of an input and its label."""
    inputs, labels = rows.inputs.ravel(), rows.labels.ravel()
    return Counter(zip(inputs[labels != -100].tolist(), labels[labels != -100].tolist(), strict=True))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("seq_len", [1, 5, 32])
@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_predicted_once_in_an_epoch(tmp_path: Path, seed: int, seq_len: int, packing: str) -> None:
    lengths = documents(seed, 120, 100)
    held = documents(seed + 10, 40, 100)
    folder, tokens = prepared(tmp_path, {"train": [lengths[:50], [], lengths[50:]], "validation": [held, []]}, 0.2)
    border = sum(lengths) + len(lengths) + 1
    for part, own in (("train", tokens[:border]), ("validation", tokens[border:])):
        said: list[str] = []
        source = folder.rows("", part, seq_len=seq_len, packing=packing, say=said.append)
        rows = source.rows(np.arange(source.num_rows))
        assert rows.inputs.shape == rows.labels.shape == rows.documents.shape == (source.num_rows, seq_len)
        assert predictions(rows) == Counter(pairwise(own))
        assert rows.padding == source.num_rows * seq_len - (len(own) - 1)
        assert (rows.inputs[rows.labels == -100] == END).all()
        for labels in rows.labels.tolist():  # padding is at the end only
            assert -100 not in labels[: seq_len - labels.count(-100)]
        if packing == "concat":
            assert rows.padding < seq_len
            assert rows.labels[rows.labels != -100].tolist() == own[1:]
        else:
            share = rows.padding / rows.labels.size
            assert f"{source.num_rows:,} {part} rows, {share:.2%} of their positions are padding" in said[0]


def test_best_fit_keeps_documents_that_fit_whole(tmp_path: Path) -> None:
    seq_len, lengths = 16, documents(3, 200, 60)
    folder, tokens = prepared(tmp_path, {"train": [lengths[:90], lengths[90:]], "validation": [[]]}, 0)
    source = folder.rows("", "train", seq_len=seq_len, packing="best_fit")
    rows = source.rows(np.arange(source.num_rows))
    seen = []
    for inputs, labels, numbers in zip(rows.inputs, rows.labels, rows.documents, strict=True):
        assert (np.diff(numbers[numbers != -1]) >= 0).all()
        assert numbers[0] == 0
        for number in np.unique(numbers[labels != -100]):
            own = (numbers == number) & (labels != -100)
            assert (inputs[own][1:] == labels[own][:-1]).all()
            seen.append([inputs[own][0].item(), *labels[own].tolist()])
    ends = [i for i, token in enumerate(tokens[:-1]) if token == END]  # the last one is the validation part's
    whole = [tokens[a : b + 1] for a, b in pairwise(ends)]
    short = [document for document in whole if len(document) - 1 <= seq_len]
    assert len(short) > 100
    assert Counter(map(tuple, short)) <= Counter(map(tuple, seen))
    # Those that are longer: full rows and a rest.
    pieces = Counter(len(piece) - 1 for piece in seen)
    expected = Counter(n for d in whole for n in [seq_len] * ((len(d) - 1) // seq_len) + [(len(d) - 1) % seq_len] if n)
    assert pieces == expected
    # Shard by shard, so that memory stays bounded: as many rows as packing each by itself takes.
    count = sum(
        len(plainly([p for n in part for p in pieces_of(0, n + 1, seq_len)], seq_len))
        for part in (lengths[:90], lengths[90:])
    )
    assert source.num_rows == count


def test_documents_of_a_concatenated_row_begin_at_their_end_of_text(tmp_path: Path) -> None:
    ids = np.array([0, 5, 6, 0, 7, 0, 0, 8, 9, 10], "<u2")
    ids.tofile(tmp_path / "ids.bin")
    source = ConcatRows(TokenShards([tmp_path / "ids.bin"], [10], dtype="<u2"), seq_len=4, end_of_text=0)
    rows = source.rows(np.array([0, 1, 2]))
    assert rows.inputs.tolist() == [[0, 5, 6, 0], [7, 0, 0, 8], [9, 0, 0, 0]]
    assert rows.labels.tolist() == [[5, 6, 0, 7], [0, 0, 8, 9], [10, -100, -100, -100]]
    assert rows.documents.tolist() == [[1, 1, 1, 2], [0, 1, 2, 2], [0, -1, -1, -1]]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_with_too_few_held_out_documents_the_end_is_held_out(tmp_path: Path, packing: str) -> None:
    folder, tokens = prepared(tmp_path, {"train": [[30, 40], [50]], "validation": [[3]]}, 0.3)
    said: list[str] = []
    sources = {
        part: folder.rows("", part, seq_len=8, packing=packing, say=said.append) for part in ("train", "validation")
    }
    border = len(tokens) - int(0.3 * len(tokens))
    assert f"the last {len(tokens) - border} tokens of the corpus are held out" in said[packing == "best_fit"]
    pairs = {part: predictions(source.rows(np.arange(source.num_rows))) for part, source in sources.items()}
    whole = list(pairwise(tokens))
    left_out = Counter([(END, END)] if packing == "best_fit" else [])  # between the two parts is no document
    assert pairs["train"] == Counter(whole[: border - 1])
    assert pairs["validation"] == Counter(whole[border:]) - left_out


def test_tables_of_rows_are_made_once_and_anew_for_other_tokens(tmp_path: Path) -> None:
    folder, _ = prepared(tmp_path, {"train": [[5, 9, 2]], "validation": [[]]}, 0)
    first = folder.rows("", "train", seq_len=8, packing="best_fit")
    table = tmp_path / "best_fit-8/train.pieces"
    time = table.stat().st_mtime_ns
    folder.rows("", "train", seq_len=8, packing="best_fit")
    assert table.stat().st_mtime_ns == time
    folder, tokens = prepared(tmp_path, {"train": [[5, 9, 2, 4]], "validation": [[]]}, 0)
    second = folder.rows("", "train", seq_len=8, packing="best_fit")
    assert predictions(second.rows(np.arange(second.num_rows))) == Counter(pairwise(tokens[:-1]))
    assert first.num_rows == 3
