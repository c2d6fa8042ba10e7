"""Row order, batch hash and shards, against their definitions."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from torchtitan_style.data.rows import ConcatRows, Rows, batch_hash, permute, row_order
from torchtitan_style.data.shards import TokenShards


def order(first: int, count: int, *, num_rows: int, key: object) -> np.ndarray:
    return row_order(np.arange(first, first + count), num_rows=num_rows, key=str(key))


@pytest.mark.parametrize("num_rows", [*range(1, 20), 31, 32, 33, 63, 64, 65, 100, 255, 256, 257, 1000, 4097])
def test_an_epoch_visits_every_row_once(num_rows: int) -> None:
    for seed in (0, 1, 2**40):
        for epoch in (0, 1, 7):
            rows = order(epoch * num_rows, num_rows, num_rows=num_rows, key=seed)
            assert sorted(rows) == list(range(num_rows))


def test_order_differs_by_seed_and_by_epoch() -> None:
    # Of 100! orders two are the same by chance never.
    orders = [order(epoch * 100, 100, num_rows=100, key=seed) for epoch in range(5) for seed in range(5)]
    assert len({tuple(rows) for rows in orders}) == 25


@pytest.mark.parametrize("num_rows", [1, 7, 64, 100])
def test_order_is_the_same_however_it_is_sliced(num_rows: int) -> None:
    whole = order(0, 3 * num_rows, num_rows=num_rows, key=3)
    for size in (1, 2, 5, 13):
        starts = range(0, 3 * num_rows, size)
        parts = [order(i, min(size, 3 * num_rows - i), num_rows=num_rows, key=3) for i in starts]
        assert np.array_equal(np.concatenate(parts), whole)


def test_order_is_not_correlated_with_the_file_or_the_epoch_before() -> None:
    n = 1000
    # The correlation of two independent orders has the standard deviation 1/sqrt(n - 1); 30 samples stay within 5.
    bound = 5 / math.sqrt(n - 1)
    for seed in range(10):
        first, second = order(0, 2 * n, num_rows=n, key=seed).reshape(2, n)
        for a, b in ((first, np.arange(n)), (second, np.arange(n)), (first, second)):
            assert abs(np.corrcoef(a, b)[0, 1]) < bound


def test_every_row_is_as_likely_to_come_first() -> None:
    num_rows, draws = 5, 2000
    firsts = [order(0, 1, num_rows=num_rows, key=seed)[0] for seed in range(draws)]
    counts, expected = np.bincount(firsts, minlength=num_rows), draws / num_rows
    # Chi-square with 4 degrees of freedom is above 23.5 in one case of 10,000.
    assert ((counts - expected) ** 2 / expected).sum() < 23.5


@pytest.mark.parametrize("num_rows", [1, 7, 100])
def test_order_is_a_function_of_each_row_alone(num_rows: int) -> None:
    whole = order(0, 4 * num_rows, num_rows=num_rows, key=3)
    shuffled = np.random.default_rng(0).permutation(4 * num_rows)
    assert np.array_equal(row_order(shuffled, num_rows=num_rows, key="3"), whole[shuffled])
    assert np.array_equal(row_order(np.array([0, 0]), num_rows=num_rows, key="3"), whole[[0, 0]])


@pytest.mark.parametrize("size", [2**31 + 11, 2**40, 2**52 + 1])
def test_permute_of_more_than_can_be_counted_out(size: int) -> None:
    positions = np.concatenate((np.arange(1000), np.arange(size - 1000, size)))
    images = permute(positions, size=size, key="k")
    assert len(np.unique(images)) == 2000
    assert images.min() >= 0
    assert images.max() < size
    # 2000 draws from 0 … size - 1: their mean is within 5 standard deviations of the middle.
    assert abs(images.mean() / size - 0.5) < 5 / math.sqrt(12 * 2000)


def shards(folder: Path, parts: list[np.ndarray]) -> TokenShards:
    paths = [folder / f"{number}.bin" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        part.astype("<u2").tofile(path)
    return TokenShards(paths, [len(part) for part in parts], dtype="<u2")


SIZES = [[10], [0, 10], [10, 0], [3, 0, 0, 4, 1, 5], [1] * 9, [0, 7, 0, 9, 0]]


@pytest.mark.parametrize("sizes", SIZES)
def test_shards_are_one_sequence(tmp_path: Path, sizes: list[int]) -> None:
    whole = np.random.default_rng(0).integers(0, 2**16, size=sum(sizes))
    tokens = shards(tmp_path, np.split(whole, np.cumsum(sizes)[:-1]))
    assert len(tokens) == len(whole)
    for start in range(len(whole) + 1):
        for count in range(len(whole) + 3):
            found = tokens.read(start, count)
            assert found.dtype == np.int64
            assert np.array_equal(found, whole[start : start + count])
    for start in range(len(whole)):
        for stop in range(start, len(whole) + 1):
            part = tokens.cut(start, stop)
            assert np.array_equal(part.read(0, 99), whole[start:stop])
            assert np.array_equal(part.cut(1, len(part)).read(0, 2), whole[start + 1 : stop][:2])


def test_shards_go_to_other_processes_without_their_content(tmp_path: Path) -> None:
    whole = np.arange(50_000)
    tokens = shards(tmp_path, np.split(whole, [20_000])).cut(10, 40_000)
    tokens.read(0, 30_000)
    sent = pickle.dumps(tokens)
    assert len(sent) < 2000
    assert np.array_equal(pickle.loads(sent).read(0, 10**6), whole[10:40_000])
    rows = ConcatRows(tokens, seq_len=7, end_of_text=0)
    indices = np.array([4, 0, 9])
    assert np.array_equal(pickle.loads(pickle.dumps(rows)).rows(indices).inputs, rows.rows(indices).inputs)


def test_rows_overlap_by_one_token_so_that_each_is_predicted_once(tmp_path: Path) -> None:
    for length in (9, 41, 44, 48):  # with none to three tokens left over at the end
        source = ConcatRows(shards(tmp_path, [np.arange(length)]), seq_len=4, end_of_text=0)
        assert source.num_rows == math.ceil((length - 1) / 4)
        rows = source.rows(np.arange(source.num_rows))
        assert rows.labels[rows.labels != -100].tolist() == list(range(1, length))
        assert rows.inputs[rows.labels != -100].tolist() == list(range(length - 1))


def some_rows(count: int = 12) -> tuple[Rows, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, 500, size=(count, 9))
    return Rows(ids[:, :-1].copy(), ids[:, 1:].copy(), np.zeros_like(ids[:, 1:])), np.arange(count)


def test_batch_hash_adds_up_over_any_partition() -> None:
    rows, positions = some_rows()
    whole = batch_hash(rows, positions)
    generator = np.random.default_rng(1)
    for parts in (1, 2, 3, 5, 12):
        owner = generator.permutation(np.arange(12) % parts)
        mine = [np.flatnonzero(owner == i) for i in range(parts)]
        assert sum(batch_hash(rows.take(own), positions[own]) for own in mine) % 2**64 == whole
    assert 0 <= whole < 2**64


def test_batch_hash_changes_when_two_rows_swap() -> None:
    rows, positions = some_rows()
    swapped = np.arange(12)
    swapped[[2, 7]] = [7, 2]
    assert batch_hash(rows.take(swapped), positions) != batch_hash(rows, positions)
    assert batch_hash(rows.take(swapped), swapped) == batch_hash(rows, positions)


def test_batch_hash_changes_with_every_token_and_label() -> None:
    rows, positions = some_rows(3)
    hashes = {batch_hash(rows, positions)}
    for array in (rows.inputs, rows.labels):
        for i in np.ndindex(array.shape):
            before = array[i]
            array[i] = -100
            hashes.add(batch_hash(Rows(rows.inputs.copy(), rows.labels.copy(), rows.documents), positions))
            array[i] = before
    assert len(hashes) == 1 + rows.inputs.size + rows.labels.size


def test_rows_are_joined_and_taken_in_order() -> None:
    rows, _ = some_rows(5)
    parts = [rows.take(np.array([i])) for i in (3, 1, 4)]
    joined = Rows.join(parts)
    for name in ("inputs", "labels", "documents"):
        assert np.array_equal(getattr(joined, name), getattr(rows, name)[[3, 1, 4]])
