"""The optimizer's step and gradient clipping in one process, against torch's own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from torchtitan_style.config.schema import Optimizer
from torchtitan_style.optim.adamw import adamw, step_if
from torchtitan_style.optim.clip import clip_grad_norm_

CONFIG = Optimizer(lr=3e-2, beta1=0.8, beta2=0.97, eps=1e-6, weight_decay=0.3)


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A matrix of each kind, a norm weight, biases, and one parameter that is not trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 5)).to(dtype)
    model[3].bias.requires_grad_(False)
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all weights and of all optimizer state."""
    tensors = [*model.parameters(), *(t for s in optimizer.state.values() for _, t in sorted(s.items()))]
    return [tensor.detach().clone() for tensor in tensors]


# Fused and plain AdamW order their few operations differently, which costs some units in the last place a step.
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_ten_steps_equal_torch_adamw(dtype: torch.dtype, rtol: float) -> None:
    model = small_model(dtype)
    reference = copy.deepcopy(model)
    norms_and_biases = {"1.bias", "2.weight"}
    named = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    plain = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n not in norms_and_biases], "weight_decay": 0.3},
            {"params": [p for n, p in named.items() if n in norms_and_biases], "weight_decay": 0.0},
        ],
        lr=3e-2,
        betas=(0.8, 0.97),
        eps=1e-6,
        foreach=False,
        fused=False,
    )
    optimizer = adamw(trained(model), CONFIG)
    for step in range(10):
        for group in (*optimizer.param_groups, *plain.param_groups):
            group["lr"] = 3e-2 * (step + 1) / 10
        give_gradients(model, step)
        give_gradients(reference, step)
        step_if(optimizer, torch.tensor(True))
        plain.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
        for key, value in plain.state[theirs].items():
            torch.testing.assert_close(optimizer.state[ours][key], value, rtol=rtol, atol=rtol)


def test_without_gradient_only_matrices_shrink() -> None:
    model = small_model()
    before = copy.deepcopy(model)
    optimizer = adamw(trained(model), CONFIG)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    step_if(optimizer, torch.tensor(True))
    for (name, now), old in zip(model.named_parameters(), before.parameters(), strict=True):
        shrunk = 1 - 3e-2 * 0.3 if name in ("0.weight", "1.weight", "3.weight") else 1
        torch.testing.assert_close(now, old * shrunk, rtol=1e-6, atol=0)  # one rounding or two in fp32


def test_what_no_decay_names_does_not_shrink() -> None:
    model = small_model()
    before = copy.deepcopy(model)
    optimizer = adamw(trained(model), CONFIG.model_copy(update={"no_decay": ["0.*", "nothing"]}))
    for parameter in trained(model).values():
        parameter.grad = torch.zeros_like(parameter)
    step_if(optimizer, torch.tensor(True))
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[1].weight, before[1].weight)


def test_state_is_there_before_the_first_step() -> None:
    model = small_model()
    optimizer = adamw(trained(model), CONFIG)
    assert set(optimizer.state) == set(trained(model).values())
    for parameter in trained(model).values():
        state = optimizer.state[parameter]
        assert {k: v.shape for k, v in state.items()} == {
            "step": torch.Size(),
            "exp_avg": parameter.shape,
            "exp_avg_sq": parameter.shape,
        }
        assert not any(value.any() for value in state.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_goes_on(bad: float) -> None:
    model = small_model()
    optimizer = adamw(trained(model), CONFIG)
    spared = small_model()  # the same run without the bad step
    spared_optimizer = adamw(trained(spared), CONFIG)
    for m, o in ((model, optimizer), (spared, spared_optimizer)):
        give_gradients(m, 0)
        step_if(o, torch.tensor(True))

    before = state_of(model, optimizer)
    give_gradients(model, 1)
    model[1].weight.grad[3, 4] = bad
    step_if(optimizer, clip_grad_norm_(model.parameters(), 1.0).isfinite())
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model, optimizer), strict=True))

    for m, o in ((model, optimizer), (spared, spared_optimizer)):
        give_gradients(m, 2)
        step_if(o, torch.tensor(True))
    after = state_of(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(after, state_of(spared, spared_optimizer), strict=True))
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3, math.inf])
def test_clipping_equals_torch(max_norm: float) -> None:
    ours, theirs = small_model(), small_model()
    give_gradients(ours, 0)
    give_gradients(theirs, 0)
    norm = clip_grad_norm_(ours.parameters(), max_norm)
    # A sum of 300 squares, here in fp64, there in fp32.
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs.parameters(), max_norm), rtol=1e-6, atol=0)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
        else:
            assert a.grad is None


def test_gradients_within_the_norm_are_left_bitwise_alone() -> None:
    model = small_model()
    give_gradients(model, 0)
    before = copy.deepcopy(model[0].weight.grad)
    clip_grad_norm_(model.parameters(), 1e3)
    assert torch.equal(model[0].weight.grad, before)
