"""Row order, batch hash and batches, against their definitions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from torchtitan_style.config.layout import BatchPlan
from torchtitan_style.data.loader import Loader, validation_batches
from torchtitan_style.data.rows import TokenFile, batch_hash, row_order

CPU = torch.device("cpu")


def token_file(folder: Path, ids: np.ndarray, seq_len: int) -> TokenFile:
    ids.astype("<u2").tofile(folder / "ids.bin")
    return TokenFile(folder / "ids.bin", dtype="<u2", seq_len=seq_len)


@pytest.mark.parametrize("num_rows", [*range(1, 20), 31, 32, 33, 63, 64, 65, 100, 255, 256, 257, 1000, 4097])
def test_an_epoch_visits_every_row_once(num_rows: int) -> None:
    for seed in (0, 1, 2**40):
        for epoch in (0, 1, 7):
            order = row_order(epoch * num_rows, num_rows, num_rows=num_rows, seed=seed)
            assert sorted(order) == list(range(num_rows))


def test_order_differs_by_seed_and_by_epoch() -> None:
    # Of 100! orders two are the same by chance never.
    orders = [row_order(epoch * 100, 100, num_rows=100, seed=seed) for epoch in range(5) for seed in range(5)]
    assert len({tuple(order) for order in orders}) == 25


@pytest.mark.parametrize("num_rows", [1, 7, 64, 100])
def test_order_is_the_same_however_it_is_sliced(num_rows: int) -> None:
    whole = row_order(0, 3 * num_rows, num_rows=num_rows, seed=3)
    for size in (1, 2, 5, 13):
        starts = range(0, 3 * num_rows, size)
        parts = [row_order(i, min(size, 3 * num_rows - i), num_rows=num_rows, seed=3) for i in starts]
        assert np.array_equal(np.concatenate(parts), whole)


def test_order_is_not_correlated_with_the_file_or_the_epoch_before() -> None:
    n = 1000
    # The correlation of two independent orders has the standard deviation 1/sqrt(n - 1); 30 samples stay within 5.
    bound = 5 / math.sqrt(n - 1)
    for seed in range(10):
        first, second = row_order(0, 2 * n, num_rows=n, seed=seed).reshape(2, n)
        for a, b in ((first, np.arange(n)), (second, np.arange(n)), (first, second)):
            assert abs(np.corrcoef(a, b)[0, 1]) < bound


def test_every_row_is_as_likely_to_come_first() -> None:
    num_rows, draws = 5, 2000
    firsts = [row_order(0, 1, num_rows=num_rows, seed=seed)[0] for seed in range(draws)]
    counts, expected = np.bincount(firsts, minlength=num_rows), draws / num_rows
    # Chi-square with 4 degrees of freedom is above 23.5 in one case of 10,000.
    assert ((counts - expected) ** 2 / expected).sum() < 23.5


def test_rows_overlap_by_one_token_so_that_each_is_predicted_once(tmp_path: Path) -> None:
    for length in (9, 41, 44, 48):  # with none to three tokens left over at the end
        tokens = token_file(tmp_path, np.arange(length), seq_len=4)
        assert tokens.num_rows == (length - 1) // 4
        loader = Loader(tokens, BatchPlan(1, 1, 1), dp_rank=0, seed=0, device=CPU)
        labels = torch.cat([loader.batch(i).microbatches[0][1][0] for i in range(tokens.num_rows)])
        assert sorted(labels.tolist()) == list(range(1, 4 * tokens.num_rows + 1))


def some_rows(count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rows = np.random.default_rng(0).integers(0, 500, size=(count, 9))
    return rows, np.arange(count)


def test_batch_hash_adds_up_over_any_partition() -> None:
    rows, positions = some_rows()
    whole = batch_hash(rows, positions)
    generator = np.random.default_rng(1)
    for parts in (1, 2, 3, 5, 12):
        owner = generator.permutation(np.arange(12) % parts)
        assert sum(batch_hash(rows[owner == i], positions[owner == i]) for i in range(parts)) % 2**64 == whole
    assert 0 <= whole < 2**64


def test_batch_hash_changes_when_two_rows_swap() -> None:
    rows, positions = some_rows()
    swapped = rows.copy()
    swapped[[2, 7]] = rows[[7, 2]]
    assert batch_hash(swapped, positions) != batch_hash(rows, positions)


def test_batch_hash_changes_with_every_token() -> None:
    rows, positions = some_rows(3)
    hashes = {batch_hash(rows, positions)}
    for i in np.ndindex(rows.shape):
        changed = rows.copy()
        changed[i] += 1
        hashes.add(batch_hash(changed, positions))
    assert len(hashes) == 1 + rows.size


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_step_has_the_same_rows_and_hash_in_every_layout(tmp_path: Path, dp: int, accumulation: int) -> None:
    seq_len, total, seed = 4, 16, 5
    ids = np.random.default_rng(0).integers(0, 500, size=90)
    tokens = token_file(tmp_path, ids, seq_len)  # 22 rows: the second step goes on into the second epoch
    plan = BatchPlan(total, total // (dp * accumulation), accumulation)
    for step in range(3):
        first = step * total
        indices = row_order(first, total, num_rows=tokens.num_rows, seed=seed)
        expected = np.stack([ids[i * seq_len : (i + 1) * seq_len + 1] for i in indices])
        batches = [Loader(tokens, plan, dp_rank=r, seed=seed, device=CPU).batch(first) for r in range(dp)]
        assert all(len(batch.microbatches) == accumulation for batch in batches)
        parts = [part for batch in batches for part in batch.microbatches]
        assert all(inputs.shape == (plan.local_batch_size, seq_len) for inputs, _ in parts)
        assert np.array_equal(torch.cat([inputs for inputs, _ in parts]), expected[:, :-1])
        assert np.array_equal(torch.cat([labels for _, labels in parts]), expected[:, 1:])
        assert all(-(2**63) <= batch.hash < 2**63 for batch in batches)  # so that it fits an int64 tensor
        assert sum(batch.hash for batch in batches) % 2**64 == batch_hash(expected, np.arange(total))


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize("local", [1, 2, 3])
@pytest.mark.parametrize("steps", [-1, 1])
def test_validation_takes_every_row_once_on_some_rank(
    tmp_path: Path, num_rows: int, dp: int, local: int, steps: int
) -> None:
    seq_len, accumulation = 4, 2
    ids = np.arange(num_rows * seq_len + 1)
    tokens = token_file(tmp_path, ids, seq_len)
    plan = BatchPlan(local * dp * accumulation, local, accumulation)
    ranks = [validation_batches(tokens, plan, dp=dp, dp_rank=r, steps=steps, device=CPU) for r in range(dp)]
    assert len({len(batches) for batches in ranks}) == 1  # or a collective would hang
    expected = num_rows if steps == -1 else min(num_rows, steps * plan.global_batch_size)
    seen = []
    for batch in zip(*ranks, strict=True):
        for inputs, labels in batch:
            assert inputs.shape == labels.shape == (local, seq_len)
            for row, targets in zip(inputs.tolist(), labels.tolist(), strict=True):
                if targets != [-100] * seq_len:
                    assert targets == [token + 1 for token in row]
                    seen.append(row[0] // seq_len)
    assert seen == list(range(expected))
