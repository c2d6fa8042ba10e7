"""When validation is due, and what is told before each batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtitan_style.config.schema import Validation
from torchtitan_style.train.observer import Observer
from torchtitan_style.train.state import TrainState
from torchtitan_style.train.validator import Validator


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Model(nn.Module):
    """A loss of 2 for each token, and every second guess right."""

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        assert not self.training
        tokens = (labels != -100).sum()
        return 2.0 * tokens, tokens // 2


def test_validation_is_due_every_so_many_steps_and_at_the_end_but_once(group) -> None:
    validator = Validator(Validation(freq=4), Model(), [], last_step=10, group=group, observer=Observer())
    assert [step for step in range(11) if validator.due(TrainState(step=step))] == [0, 4, 8, 10]
    assert not validator.due(TrainState(step=4, validated_step=4))
    assert validator.due(TrainState(step=8, validated_step=4))
    off = Validator(Validation(enable=False), Model(), [], last_step=10, group=group, observer=Observer())
    assert not off.due(TrainState(step=10))


def test_the_mean_is_over_tokens_and_a_stop_has_no_figures(group) -> None:
    told: list[int] = []
    observer = Observer()
    observer.before_validation_batch = told.append  # type: ignore[method-assign]
    labels = torch.tensor([[1, 2, 3, -100]])
    batches, model = [(labels, labels)] * 2, Model()
    validator = Validator(Validation(), model, batches, last_step=10, group=group, observer=observer)
    figures = validator.run(5, stop=lambda: False)
    assert figures is not None
    assert figures["val_loss"] == 2.0
    assert figures["val_accuracy"] == pytest.approx(1 / 3)
    assert told == [5, 5]
    assert validator.run(6, stop=lambda: len(told) == 3) is None
    assert told == [5, 5, 6]
    assert model.training
