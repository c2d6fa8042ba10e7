"""The chunked loss against the textbook form, whole and split over ranks; its memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from torchtitan_style.distributed import loss as loss_module
from torchtitan_style.distributed.loss import chunked_cross_entropy
from torchtitan_style.models.qwen3.model import token_loss


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def inputs(dtype: torch.dtype, *, tokens: int = 60, vocabulary: int = 97) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, tokens // 2, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (2, tokens // 2), generator=generator)
    labels[0, ::3] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("rows", [1, 7, 60, 1000])
def test_equals_the_textbook_form(group, monkeypatch, rows: int) -> None:
    monkeypatch.setattr(loss_module, "MIN_TOKENS_PER_CHUNK", {"cpu": rows})
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 1)
    results = []
    for function in (token_loss, chunked_cross_entropy(group, compiled=False)):
        hidden, weight, labels = inputs(torch.float32)
        loss, right = function(hidden, weight, labels)
        (loss / 7).backward()
        results.append((loss, right, hidden.grad, weight.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_z_loss_equals_its_definition(group, monkeypatch, compiled: bool) -> None:
    monkeypatch.setattr(loss_module, "MIN_TOKENS_PER_CHUNK", {"cpu": 25})  # of 60: the last chunk is shorter
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 1)
    results = []
    for function in (token_loss, chunked_cross_entropy(group, compiled=compiled)):
        hidden, weight, labels = inputs(torch.float32)
        loss, right = function(hidden, weight, labels, 0.3)
        loss.backward()
        results.append((loss, right, hidden.grad, weight.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    hidden, weight, labels = inputs(torch.float32)
    normaliser = (hidden.flatten(0, 1) @ weight.T).exp().sum(-1).log()
    extra = 0.3 * normaliser[labels.flatten() != -100].square().sum()
    torch.testing.assert_close(results[0][0], token_loss(hidden, weight, labels)[0] + extra)


def test_ranks_that_share_out_the_vocabulary_have_the_same(run_ranks, tmp_path: Path) -> None:
    """Traced by the compiler, too, which training does on GPUs alone."""
    run_ranks(Path(__file__).with_name("loss_of_slices.py"), 2, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert len(found) == 8
    assert max(found.values()) < 1e-5


def test_bf16_gradients_are_as_near_to_fp32_as_autograds(group) -> None:
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs(torch.bfloat16)[:2]]
    token_loss(*exact, inputs(torch.bfloat16)[2])[0].backward()
    errors = []
    for function in (token_loss, chunked_cross_entropy(group, compiled=False)):
        hidden, weight, labels = inputs(torch.bfloat16)
        function(hidden, weight, labels)[0].backward()
        errors.append([(t.grad.float() - e.grad).norm() for t, e in zip((hidden, weight), exact, strict=True)])
    for textbook, ours in zip(*errors, strict=True):
        assert ours <= 1.1 * textbook


def test_no_gradient_is_computed_without_need(group) -> None:
    hidden, weight, labels = inputs(torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss, _ = chunked_cross_entropy(group, compiled=False)(hidden, weight, labels)
    assert counter.get_total_flops() == 2 * labels.numel() * weight.numel()  # one matrix multiplication
    torch.testing.assert_close(loss, token_loss(hidden, weight, labels)[0].detach())


def test_the_logits_of_all_tokens_never_exist(group) -> None:
    tokens, vocabulary = 8192, 8192
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            outputs = function(*args, **(kwargs or {}))
            for output in outputs if isinstance(outputs, tuple | list) else [outputs]:
                if isinstance(output, torch.Tensor):
                    largest = max(largest, output.numel())
            return outputs

    hidden, weight, labels = inputs(torch.bfloat16, tokens=tokens, vocabulary=vocabulary)
    with Watch():
        chunked_cross_entropy(group, compiled=False)(hidden, weight, labels)[0].backward()
    assert largest <= tokens * vocabulary / 8
