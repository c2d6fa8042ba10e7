"""Linear layers whose weights' gradients are computed after those of inputs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchtitan_style.distributed.sharding import compute_in
from torchtitan_style.distributed.weight_gradients import WeightGradients


class Model(nn.Module):
    def __init__(self, *, recomputed: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3, bias=False)
        self.block = partial(checkpoint, self._block, use_reentrant=False) if recomputed else self._block

    def _block(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x).sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(x))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("dtype", "recomputed"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_two_microbatches_give_the_gradients_of_one_pass(dtype: torch.dtype, recomputed: bool) -> None:
    torch.manual_seed(0)
    model = Model(recomputed=recomputed)
    inputs = [torch.randn(2, 5, 4, dtype=dtype, requires_grad=True) for _ in range(2)]
    compute_in(model, dtype)
    for x in inputs:
        model(x).float().square().sum().backward()
    expected, of_inputs = gradients(model), [x.grad for x in inputs]

    model.zero_grad()
    postponed = WeightGradients(model, torch.float32)
    compute = []
    for x in inputs:
        x.grad = None
        model(x).float().square().sum().backward()
        compute.append(postponed.take())
    for x, gradient in zip(inputs, of_inputs, strict=True):
        torch.testing.assert_close(x.grad, gradient)
    at_once = {"first.bias", "norm.weight", "norm.bias"}
    found = gradients(model)
    assert {name for name, gradient in found.items() if gradient is not None} == at_once
    for function in compute:
        function()
    torch.testing.assert_close(gradients(model), expected)


def test_what_is_gathered_in_bf16_has_its_gradients_added_up_in_fp32() -> None:
    model = nn.Linear(4, 6, bias=False).bfloat16()
    postponed = WeightGradients(model, torch.float32)
    for scale in (256.0, 1.0):  # bf16 cannot represent 257
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().mul(scale).backward()
        postponed.take()()
    assert torch.equal(model.weight.grad, torch.full((6, 4), 257.0))


def test_frozen_weights_and_inputs_without_gradients_have_none_computed() -> None:
    model = Model(recomputed=False)
    model.last.weight.requires_grad_(False)
    postponed = WeightGradients(model, torch.float32)
    model(torch.randn(2, 5, 4)).sum().backward()
    postponed.take()()
    assert model.last.weight.grad is None
    assert model.first.weight.grad is not None
