"""Tokens are drawn with the probabilities that the logits and the filters say: closed forms, and Transformers' own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from torchtitan_style.common.errors import UserError
from torchtitan_style.inference.sampling import Sampler, filter_logits
from torchtitan_style.inference.settings import Sampling

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0, -0.5])
PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": 0}


def draw(count: int, *, seed: int = 0, logits: Tensor = LOGITS, **settings: Any) -> list[int]:
    sampler = Sampler(Sampling(**PLAIN | settings), seeds=[seed])
    return [sampler.pick(logits[None])[0] for _ in range(count)]


def allowed(**settings: Any) -> set[int]:
    filtered = filter_logits(LOGITS[None], Sampling(**PLAIN | settings))[0]
    return set(filtered.isfinite().nonzero().flatten().tolist())


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(20, temperature=0.0) == [1] * 20
    assert draw(20, temperature=0.0, top_k=3, top_p=0.1) == [1] * 20


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("filters", "tokens"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 3}, [0, 1, 3]),
        ({"top_k": 40}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_frequencies_are_those_of_the_softmax(temperature: float, filters: dict, tokens: list[int]) -> None:
    weights = torch.zeros(6, dtype=torch.float64)
    weights[tokens] = (LOGITS[tokens].double() / temperature).exp()
    expected = 5000 * weights / weights.sum()
    counts = torch.bincount(torch.tensor(draw(5000, temperature=temperature, **filters)), minlength=6)
    assert not counts[expected == 0].any()
    # Chi-square with at most 5 degrees of freedom is above 25.7 in one case of 10,000.
    assert (((counts - expected) ** 2 / expected)[expected > 0]).sum() < 25.7


def test_top_k_keeps_all_that_are_as_likely_as_the_last() -> None:
    assert allowed(top_k=1) == {1}
    assert allowed(top_k=4) == {0, 1, 3, 4}
    tied = filter_logits(torch.tensor([[1.0, 3.0, 1.0, 0.0]]), Sampling(**PLAIN | {"top_k": 2}))
    assert tied[0].isfinite().tolist() == [True, True, True, False]


def test_top_p_keeps_the_smallest_set_that_has_the_probability() -> None:
    probabilities = torch.softmax(LOGITS.double(), dim=0)
    for top_p in (0.01, 0.3, 0.58, 0.59, 0.8, 0.95, 0.999):
        order, total, expected = LOGITS.argsort(descending=True).tolist(), 0.0, set()
        for token in order:  # Holtzman et al. 2020, equation 2
            expected.add(token)
            total += probabilities[token].item()
            if total >= top_p:
                break
        assert allowed(top_p=top_p) == expected


def test_min_p_keeps_a_share_of_the_likeliest() -> None:
    probabilities = torch.softmax(LOGITS, dim=0)
    for min_p in (0.05, 0.2, 0.4, 1.0):
        expected = (probabilities >= min_p * probabilities.max()).nonzero().flatten().tolist()
        assert allowed(min_p=min_p) == set(expected)


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.7},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "temperature": 1.7, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocabulary", [50, 5000])  # below and above what top-p looks at first
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_filters_are_those_of_transformers(settings: dict, vocabulary: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    # In fp64: where the sum of top-p comes near the bound, adding up from the other end rounds otherwise.
    logits = spread * torch.randn(3, vocabulary, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, vocabulary, (3, 20), generator=generator)
    sampling = Sampling(**PLAIN | settings)
    processors = transformers.LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(transformers.MinPLogitsWarper(sampling.min_p))
    seen = torch.zeros(3, vocabulary, dtype=torch.bool).scatter(1, ids, True)
    found = filter_logits(logits, sampling, seen)
    torch.testing.assert_close(found, processors(ids, logits.clone()), rtol=1e-6, atol=1e-6)


def test_drawn_tokens_count_as_seen() -> None:
    # With this penalty a token that was drawn has next to no chance while others are left.
    sampler = Sampler(Sampling(temperature=0.0, repetition_penalty=1e6), seeds=[0, 1], prompts=[[1], [0, 3]])
    logits = LOGITS.abs().expand(2, 6)
    drawn = [sampler.pick(logits) for _ in range(3)]
    assert [row[0] for row in drawn] == [2, 3, 0]  # -1 and -0.5 are turned around
    assert [row[1] for row in drawn] == [1, 2, 5]


def test_the_same_seed_draws_the_same_tokens_whatever_the_other_rows() -> None:
    assert draw(50, seed=1) == draw(50, seed=1)
    assert draw(50, seed=1) != draw(50, seed=2)
    sampler = Sampler(Sampling(**PLAIN), seeds=[5, 1, 7])
    others = torch.stack((LOGITS.flip(0), LOGITS, LOGITS * 2))
    first = [sampler.pick(others)[1] for _ in range(25)]
    sampler.select([1, 2])
    rest = [sampler.pick(others[1:])[0] for _ in range(25)]
    assert first + rest == draw(50, seed=1)


def test_what_has_no_probability_is_never_drawn() -> None:
    logits = torch.full((1000,), -math.inf)
    logits[[3, 700]] = 0.0
    assert set(draw(300, logits=logits)) == {3, 700}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 20.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
    ],
)
def test_a_setting_without_meaning_is_named(setting: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^--{setting.replace('_', '-')}: must be .*{value}$"):
        Sampling(**{setting: value}).check("--")
