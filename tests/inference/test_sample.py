"""Samples while training: with and without the cache the same text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_style import Qwen3ForCausalLM
from torchtitan_style.config.schema import Generation
from torchtitan_style.inference.sample import sample
from torchtitan_style.models.qwen3.config import FLAVORS

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Counter:
    """A "model" that always predicts the next number, whatever comes after, and notes its inputs' shapes."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, ids: Tensor, **_: object) -> Tensor:
        self.shapes.append(tuple(ids.shape))
        return torch.nn.functional.one_hot(ids + 1, 51).float()


def continuation(
    model: object, prompt: list[int], *, end: int = 49, max_length: int = 40, multiple_of: int = 4, **settings: object
) -> list[int]:
    return sample(
        model,
        prompt,
        Generation(**{"temperature": 0.0, "max_new_tokens": 10} | settings),
        end_of_text=end,
        max_length=max_length,
        windows=[None, None],
        multiple_of=multiple_of,
        seed=0,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("multiple_of", [1, 4])
def test_a_sample_ends_with_enough_tokens_with_end_of_text_or_with_the_models_length(multiple_of: int) -> None:
    assert continuation(Counter(), [3, 4, 5], max_new_tokens=3, multiple_of=multiple_of) == [6, 7, 8]
    assert continuation(Counter(), [3, 4, 5], end=8, multiple_of=multiple_of) == [6, 7]
    assert continuation(Counter(), [3, 4, 5], max_length=5, multiple_of=multiple_of) == [6, 7]
    assert continuation(Counter(), [3, 4, 5], max_length=3, multiple_of=multiple_of) == []


def test_without_cache_positions_are_padded_to_a_multiple_and_predicted_before_the_padding() -> None:
    model = Counter()
    assert continuation(model, [3, 4, 5], end=0, max_new_tokens=3) == [6, 7, 8]
    assert model.shapes == [(1, 4), (1, 4), (1, 8)]


def test_with_cache_each_token_goes_through_the_model_once() -> None:
    model = Counter()
    assert continuation(model, [3, 4, 5], end=0, max_new_tokens=3, multiple_of=1) == [6, 7, 8]
    assert model.shapes == [(1, 3), (1, 1), (1, 1)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_does_not_change_the_text(temperature: float) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(FLAVORS["debug"]).eval()
    for parameter in model.parameters():
        parameter.data.mul_(5.0)  # so that the text is not one token repeated
    with_cache, without = (
        continuation(model, [3, 4, 5], end=511, max_new_tokens=30, temperature=temperature, multiple_of=multiple_of)
        for multiple_of in (1, 2)
    )
    assert with_cache == without
    assert len(set(with_cache)) > 2
