"""Which corpus a row comes from: shares for all beginnings and windows, and nothing but the row decides."""

from __future__ import annotations

import numpy as np
import pytest

from torchtitan_style.data.mixture import choose

WEIGHTS = [
    [0.5, 0.5],
    [0.9, 0.1],
    [0.999, 0.001],
    [1 / 3, 1 / 3, 1 / 3],
    [0.6180339887, 0.3819660113],  # the golden ratio itself
    [0.1] * 10,
    [0.7, 0.2, 0.05, 0.03, 0.02],
    [1e-6, 1 - 1e-6],
]
ROWS = np.arange(20_000)


@pytest.mark.parametrize("key", ["0", "17"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_are_right_within_a_few_rows_in_every_window(weights: list[float], key: str) -> None:
    for first in (0, 10**12):
        chosen = choose(ROWS + first, weights, key)
        assert chosen.min() >= 0
        assert chosen.max() < len(weights)
        for corpus, weight in enumerate(weights):
            ahead = np.concatenate(([0.0], np.cumsum((chosen == corpus) - weight)))
            # The count in any window minus its share is a difference of two of these.
            assert ahead.max() - ahead.min() < 6


def test_a_row_depends_on_its_number_alone() -> None:
    weights = [0.5, 0.3, 0.2]
    whole = choose(ROWS, weights, "3")
    rng = np.random.default_rng(0)
    for parts in (2, 3, 8):
        owner = rng.integers(0, parts, len(ROWS))
        for part in range(parts):
            assert np.array_equal(choose(ROWS[owner == part], weights, "3"), whole[owner == part])
    order = rng.permutation(len(ROWS))
    assert np.array_equal(choose(ROWS[order], weights, "3"), whole[order])
    assert [choose(np.array([row]), weights, "3")[0] for row in range(50)] == whole[:50].tolist()


def test_keys_begin_elsewhere() -> None:
    first = {tuple(choose(np.arange(10_000), [0.5, 0.5], str(seed)).tolist()) for seed in range(20)}
    assert len(first) == 20


def test_rows_are_mixed_and_not_in_blocks() -> None:
    chosen = choose(ROWS, [0.5, 0.5], "0")
    same = (chosen[1:] == chosen[:-1]).mean()
    assert 0.1 < same < 0.5
    borders = np.flatnonzero(chosen[1:] != chosen[:-1])
    assert np.diff(borders).max() <= 4


def test_one_corpus_is_chosen_always() -> None:
    assert choose(ROWS, [1.0], "0").tolist() == [0] * len(ROWS)
    assert choose(np.empty(0, np.int64), [0.5, 0.5], "0").tolist() == []
