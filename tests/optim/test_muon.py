"""Muon in one process: against torch's own, against the definition, and which parameters it takes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from torchtitan_style import Qwen3ForCausalLM
from torchtitan_style.config.schema import LRScheduler, Muon, Optimizer
from torchtitan_style.models.qwen3.config import FLAVORS
from torchtitan_style.models.qwen3.spec import QWEN3
from torchtitan_style.models.qwen3_moe.config import FLAVORS as EXPERTS
from torchtitan_style.models.qwen3_moe.model import Qwen3MoeForCausalLM
from torchtitan_style.models.qwen3_moe.spec import QWEN3_MOE
from torchtitan_style.optim.build import Optimizers
from torchtitan_style.optim.muon import Muon as MuonOptimizer
from torchtitan_style.optim.normuon import normalize_rows
from torchtitan_style.optim.orthogonalize import orthogonalize, step_scale

SHAPES = [(16, 16), (24, 8), (8, 40), (7, 5), (1, 9)]
SOUND = torch.tensor(True)


def matrices() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(0.1 * torch.randn(shape)) for shape in SHAPES]


def give_gradients(parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96), (5, 5), (1, 8)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    # Smaller ones than a hundredth of the norm need more rounds; a random square matrix has some.
    kept = s / s.norm() > 0.01
    values = torch.diag(u.T @ orthogonalize(matrix, rounds=5) @ v.T)
    assert values[kept].min() > 0.65
    assert values.max() < 1.25
    rest = u.T @ orthogonalize(matrix, rounds=5) @ v.T - torch.diag(values)
    assert rest.abs().max() < 1e-9


def test_a_matrix_of_zeros_stays_one() -> None:
    assert torch.equal(orthogonalize(torch.zeros(4, 6), rounds=5), torch.zeros(4, 6))


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_ten_steps_equal_torch_muon(adjust_lr: Any, nesterov: bool) -> None:
    ours, theirs = matrices(), matrices()
    config = Muon(momentum=0.9, nesterov=nesterov, adjust_lr=adjust_lr)
    optimizer = MuonOptimizer(ours, config, lr=0.02, weight_decay=0.1, dtype=torch.bfloat16)
    plain = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust_lr, ns_steps=5
    )
    for step in range(10):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step_if(SOUND)
        plain.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def normuon(
    weight: Tensor, gradients: list[Tensor], *, rows: int, lr: float, decay: float, momentum: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """NorMuon for a matrix of blocks of so many rows (Li et al. 2025, algorithm 1; the norm is the authors' code's):
    new weight and mean squares."""
    mean, mean_squares = torch.zeros_like(weight), torch.zeros(len(weight), 1)
    for gradient in gradients:
        mean = momentum * mean + (1 - momentum) * gradient
        direction = momentum * mean + (1 - momentum) * gradient
        weight = weight * (1 - lr * decay)
        for start in range(0, len(weight), rows):
            block = slice(start, start + rows)
            orthogonal = orthogonalize(direction[block], rounds=5)
            mean_squares[block] = beta2 * mean_squares[block] + (1 - beta2) * (orthogonal**2).mean(1, keepdim=True)
            update = orthogonal / (mean_squares[block].sqrt() + 1e-10)
            update *= orthogonal.norm() / update.norm()
            weight[block] -= lr * 0.2 * max(update.shape) ** 0.5 * update
    return weight, mean_squares


def test_ten_steps_are_normuons() -> None:
    """Whole matrices, heads, and a stack."""
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    starts = [*matrices(), torch.randn(12, 20), torch.randn(3, 16, 24)]
    ours = [torch.nn.Parameter(start.detach().clone()) for start in starts]
    rows = [*(None for _ in SHAPES), 4, 8]
    config = Muon(momentum=0.9, normuon_beta2=0.8)
    optimizer = MuonOptimizer(ours, config, block_rows=rows, dtype=torch.float32, **options)
    given: list[list[Tensor]] = []
    for step in range(10):
        give_gradients(ours, step)
        given.append([p.grad.clone() for p in ours])
        optimizer.step_if(SOUND)
    for i, parameter in enumerate(ours):
        weight, *gradients = [tensor.flatten(0, -2) for tensor in (starts[i].detach(), *(g[i] for g in given))]
        expected = normuon(weight, gradients, rows=rows[i] or len(weight), lr=0.02, decay=0.1, momentum=0.9, beta2=0.8)
        found = parameter.detach(), optimizer.state[parameter]["row_mean_squares"]
        for a, b in zip(found, expected, strict=True):
            # The same products, batched: fp32 rounding, which the iteration amplifies.
            torch.testing.assert_close(a.flatten(0, -2), b, rtol=1e-4, atol=1e-5)


def test_normuon_brings_rows_to_one_size_and_keeps_the_norm() -> None:
    """At its first step, whose mean is that of one matrix; rows and matrices of zeros stay so."""
    matrix = torch.randn(2, 9, 30, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 9)[:, None]
    matrix[0, 4], matrix[1] = 0, 0
    norm, mean_squares = matrix[0].norm(), torch.zeros(2, 9, 1)
    normalize_rows(matrix, mean_squares, SOUND, beta2=0.95)
    others = [*range(4), *range(5, 9)]
    torch.testing.assert_close(matrix[0, others].norm(dim=-1), (norm / 8**0.5).expand(8))
    assert not matrix[0, 4].any()
    assert not matrix[1].any()


def test_with_match_rms_an_element_moves_about_as_much_as_under_adamw() -> None:
    for shape in ((256, 256), (1024, 256), (64, 512)):
        moved = orthogonalize(torch.randn(shape), rounds=5) * step_scale(*shape, "match_rms_adamw")
        assert moved.pow(2).mean().sqrt() == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad: float) -> None:
    parameters = matrices()
    optimizer = MuonOptimizer(parameters, Muon(normuon_beta2=0.9), lr=0.02, weight_decay=0.1, dtype=torch.float32)
    give_gradients(parameters, 0)
    optimizer.step_if(SOUND)

    def everything() -> list[Tensor]:
        state = [tensor for p in parameters for tensor in optimizer.state[p].values()]
        assert len(state) == 2 * len(parameters)
        return [tensor.detach().clone() for tensor in (*parameters, *state)]

    before = everything()
    give_gradients(parameters, 1)
    parameters[0].grad[0, 0] = bad
    optimizer.step_if(torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    give_gradients(parameters, 2)
    optimizer.step_if(SOUND)
    assert not torch.equal(before[0], parameters[0])


def build(**settings: Any) -> tuple[Qwen3ForCausalLM, Optimizers]:
    model = Qwen3ForCausalLM(FLAVORS["debug"])
    config = Optimizer(name="muon", lr=1e-3, **settings)
    scheduler = LRScheduler(warmup_steps=4, decay_type="linear")
    return model, Optimizers(model, config, scheduler, total_steps=10, dtype=torch.float32, spec=QWEN3, head_dim=16)


def test_muon_takes_routers_and_experts() -> None:
    """With the rate of the embedding, 3.2e-2 in the default run, a router is sure of its choice after 20 steps."""
    model = Qwen3MoeForCausalLM(EXPERTS["debug"])
    config, scheduler = Optimizer(name="muon"), LRScheduler(warmup_steps=4)
    optimizers = Optimizers(model, config, scheduler, total_steps=10, dtype=torch.float32, spec=QWEN3_MOE, head_dim=16)
    assert optimizers.muon is not None
    names = {p: name for name, p in model.named_parameters()}
    taken = {names[p].rpartition(".mlp.")[2] for p in optimizers.muon.matrices if ".mlp." in names[p]}
    assert taken == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}


def test_muon_takes_the_matrices_of_attention_and_mlp_alone() -> None:
    model, optimizers = build()
    assert optimizers.muon is not None
    names = {p: name for name, p in model.named_parameters()}
    taken = {names[p].rpartition(".layers.")[2].split(".", 1)[1] for p in optimizers.muon.matrices}
    projections = {f"self_attn.{x}_proj.weight" for x in "qkvo"} | {
        f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")
    }
    assert taken == projections
    assert len(optimizers.muon.matrices) == 14
    others = {names[p] for group in optimizers.adamw.param_groups for p in group["params"]}
    assert "model.embed_tokens.weight" in others
    assert len(others) + 14 == len(names)
    assert {k for s in optimizers.state.values() for k in s} == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}


def test_each_has_its_own_rate_and_schedule() -> None:
    _, optimizers = build(muon=Muon(lr=0.02, warmup_steps=0, decay_ratio=0.5, min_lr_factor=0.1))
    assert optimizers.learning_rates(2) == {"lr": pytest.approx(1e-3 * 2 / 5), "lr_muon": 0.02}
    last = optimizers.learning_rates(10)
    assert last["lr_muon"] == pytest.approx(0.02 * (0.1 + 0.9 / 6))


def test_the_schedules_go_on_with_each_step_that_is_taken() -> None:
    model, optimizers = build(muon=Muon(lr=0.02, warmup_steps=3))
    assert optimizers.muon is not None
    for sound, update in ((True, 1), (False, 2), (False, 2), (True, 2), (True, 3)):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizers.step_if(torch.tensor(sound))
        rates = optimizers.learning_rates(update)
        assert optimizers.muon.param_groups[0]["lr"].item() == pytest.approx(rates["lr_muon"])
        for group in optimizers.adamw.param_groups:
            assert group["lr"].item() == pytest.approx(rates["lr"])
    optimizers.start_after(7)
    optimizers.step_if(torch.tensor(True))
    assert optimizers.muon.param_groups[0]["lr"].item() == pytest.approx(optimizers.learning_rates(8)["lr_muon"])


def test_heads_by_themselves() -> None:
    matrix = torch.randn(12, 20, generator=torch.Generator().manual_seed(3))
    whole = orthogonalize(matrix.view(3, 4, 20), rounds=5).flatten(0, 1)
    apart = torch.cat([orthogonalize(head, rounds=5) for head in matrix.split(4)])
    torch.testing.assert_close(whole, apart)
    assert not torch.allclose(whole, orthogonalize(matrix, rounds=5), atol=0.05)
    tall = orthogonalize(matrix.T.contiguous().view(2, 10, 12), rounds=5).flatten(0, 1)
    torch.testing.assert_close(tall[:10], orthogonalize(matrix.T[:10], rounds=5))

    model, optimizers = build(muon=Muon(per_head=True))
    assert optimizers.muon is not None
    names = {p: name for name, p in model.named_parameters()}
    for matrix, head_dim in zip(optimizers.muon.matrices, optimizers.muon.block_rows, strict=True):
        with_heads = names[matrix].split(".")[-2] in ("q_proj", "k_proj", "v_proj")
        assert head_dim == (16 if with_heads else None)


def test_left_out_settings_are_adamws() -> None:
    _, optimizers = build(weight_decay=0.3)
    assert optimizers.muon is not None
    assert optimizers.muon.param_groups[0]["weight_decay"] == 0.3
    rates = optimizers.learning_rates(7)
    assert rates["lr"] == rates["lr_muon"]


def test_one_step_is_the_definition() -> None:
    """Momentum, Nesterov, U·Vᵀ within the iteration's reach, decay: written out with torch's SVD."""
    parameter = torch.nn.Parameter(torch.randn(12, 20, generator=torch.Generator().manual_seed(3)))
    before = copy.deepcopy(parameter.data)
    optimizer = MuonOptimizer([parameter], Muon(adjust_lr="original"), lr=0.1, weight_decay=0.2, dtype=torch.float32)
    gradient = torch.randn(12, 20, generator=torch.Generator().manual_seed(4))
    parameter.grad = gradient.clone()
    optimizer.step_if(SOUND)
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    step = (before * (1 - 0.1 * 0.2) - parameter.data) / 0.1
    assert (step - u @ v).norm() / (u @ v).norm() < 0.35  # singular values in 0.7 … 1.2 instead of 1
    assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.97


def test_stacked_experts_are_orthogonalised_one_by_one() -> None:
    torch.manual_seed(0)
    gate_up, down = torch.randn(3, 2 * 8, 24), torch.randn(3, 24, 8)
    stacked = [torch.nn.Parameter(gate_up.clone()), torch.nn.Parameter(down.clone())]
    single = [torch.nn.Parameter(m.clone()) for m in (*gate_up.view(6, 8, 24), *down)]
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "dtype": torch.float32}
    optimizers = [
        MuonOptimizer(stacked, Muon(), block_rows=[8, 24], **options),
        MuonOptimizer(single, Muon(), **options),
    ]
    for seed in range(3):
        give_gradients(stacked, seed)
        gradients = [*stacked[0].grad.view(6, 8, 24), *stacked[1].grad]
        for parameter, gradient in zip(single, gradients, strict=True):
            parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step_if(SOUND)
    found = [*stacked[0].view(6, 8, 24), *stacked[1]]
    for matrix, right in zip(found, single, strict=True):
        # The same products, batched: fp32 rounding, which the iteration amplifies.
        torch.testing.assert_close(matrix, right, rtol=1e-4, atol=1e-5)


def test_how_many_are_multiplied_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for at_most in (10**9, 2_000, 1):
        monkeypatch.setattr("torchtitan_style.optim.muon.OWNED_ELEMENTS", at_most)
        torch.manual_seed(0)
        model, optimizers = build(muon=Muon(per_head=True, normuon_beta2=0.9))
        assert optimizers.muon is not None
        results.append((len(optimizers.muon.alone), model))
        give_gradients(list(model.parameters()), seed=5)
        optimizers.step_if(SOUND)
    (few, together), (more, _), (most, alone) = results
    assert few < more <= most == len(optimizers.muon.matrices)
    for expected, parameter in zip(alone.parameters(), together.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_what_muon_does_not_take_may_have_a_rate_of_its_own() -> None:
    config = {"lr": 1e-3, "weight_decay": 0.0}
    assert Optimizer(name="adamw", muon=Muon(adamw_lr=8e-3), **config).adamw_lr == 1e-3
    model = Qwen3ForCausalLM(FLAVORS["debug"])
    optimizers = Optimizers(
        model,
        Optimizer(name="muon", muon=Muon(adamw_lr=8e-3), **config),
        LRScheduler(warmup_steps=1),
        total_steps=10,
        dtype=torch.float32,
        spec=QWEN3,
        head_dim=16,
    )
    before = model.model.embed_tokens.weight.detach().clone()
    give_gradients(list(model.parameters()), seed=1)
    optimizers.step_if(SOUND)
    rates = optimizers.learning_rates(1)
    assert rates["lr"] == pytest.approx(8 * rates["lr_muon"])
    moved = (model.model.embed_tokens.weight - before).abs().max().item()
    assert moved == pytest.approx(rates["lr"], rel=1e-3)  # as much as the first step of Adam changes an element
