"""Tokens are drawn with the probabilities that the logits say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_style.config.schema import Generation
from torchtitan_style.inference.sample import pick_token, sample

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0, -0.5])


def draw(count: int, *, seed: int = 0, temperature: float = 1.0, top_k: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [pick_token(LOGITS, temperature=temperature, top_k=top_k, generator=generator) for _ in range(count)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(20, temperature=0.0) == [1] * 20
    assert draw(20, temperature=0.0, top_k=3) == [1] * 20


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_only_the_top_k_are_drawn_and_all_of_them(top_k: int) -> None:
    assert set(draw(2000, top_k=top_k)) == set(LOGITS.topk(top_k).indices.tolist())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 3, 6, 40])
def test_frequencies_are_those_of_the_softmax(temperature: float, top_k: int) -> None:
    allowed = LOGITS.argsort(descending=True)[: top_k or None]
    weights = torch.zeros(6, dtype=torch.float64)
    weights[allowed] = (LOGITS[allowed].double() / temperature).exp()
    expected = 5000 * weights / weights.sum()
    counts = torch.bincount(torch.tensor(draw(5000, temperature=temperature, top_k=top_k)), minlength=6)
    assert not counts[expected == 0].any()
    # Chi-square with at most 5 degrees of freedom is above 25.7 in one case of 10,000.
    assert (((counts - expected) ** 2 / expected)[expected > 0]).sum() < 25.7


def test_the_same_seed_draws_the_same_tokens() -> None:
    assert draw(50, seed=1) == draw(50, seed=1)
    assert draw(50, seed=1) != draw(50, seed=2)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Counter:
    """A "model" that always predicts the next number, whatever comes after, and notes its inputs' shapes."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, ids: Tensor) -> Tensor:
        self.shapes.append(tuple(ids.shape))
        return torch.nn.functional.one_hot(ids + 1, 51).float()


def continuation(model: Counter, prompt: list[int], *, end: int = 49, max_length: int = 40, **settings) -> list[int]:
    return sample(
        model,
        prompt,
        Generation(temperature=0.0, **{"max_new_tokens": 10} | settings),
        end_of_text=end,
        max_length=max_length,
        multiple_of=4,
        seed=0,
        device=torch.device("cpu"),
    )


@pytest.mark.usefixtures("one_process")
def test_a_sample_ends_with_enough_tokens_with_end_of_text_or_with_the_models_length() -> None:
    assert continuation(Counter(), [3, 4, 5], max_new_tokens=3) == [6, 7, 8]
    assert continuation(Counter(), [3, 4, 5], end=8) == [6, 7]
    assert continuation(Counter(), [3, 4, 5], max_length=5) == [6, 7]
    assert continuation(Counter(), [3, 4, 5], max_length=3) == []


@pytest.mark.usefixtures("one_process")
def test_positions_are_padded_to_a_multiple_and_predicted_before_the_padding() -> None:
    model = Counter()
    assert continuation(model, [3, 4, 5], end=0, max_new_tokens=3) == [6, 7, 8]
    assert model.shapes == [(1, 4), (1, 4), (1, 8)]
