"""Attention on CPU, compiled in bf16 and of the last queries of a row, against attention in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_style.cpu.attention import on_cpu
from torchtitan_style.models.qwen3.attention import attention_mask


def not_plainly(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("the fast way does not apply")


@pytest.mark.parametrize(
    ("b", "heads", "key_value_heads", "t", "s", "d", "masked", "backend"),
    [
        (2, 2, 1, 140, 300, 16, "documents", "inductor"),
        # Traced and differentiated in the same way, but computed by torch's own kernels: g++ takes longest by far.
        (2, 4, 2, 200, 500, 16, "", "aot_eager"),
        (2, 4, 2, 256, 256, 32, "", "aot_eager"),
        (1, 3, 3, 300, 300, 16, "", "aot_eager"),
        (2, 8, 1, 64, 64, 64, "", "aot_eager"),
        (2, 8, 2, 192, 300, 16, "", "aot_eager"),
        (1, 2, 1, 1025, 1025, 32, "", "aot_eager"),
        (3, 4, 2, 260, 260, 32, "documents", "aot_eager"),
        (2, 2, 1, 256, 256, 16, "window", "aot_eager"),
    ],
)
def test_every_gradient_is_that_of_fp64(
    b: int, heads: int, key_value_heads: int, t: int, s: int, d: int, masked: str, backend: str
) -> None:
    """The queries are those of the last t of s positions."""
    torch.manual_seed(0)
    documents = (torch.rand(b, s) < 0.02).cumsum(1) if masked == "documents" else None
    mask = attention_mask(documents, s, 40 if masked == "window" else None, flex=False, device=torch.device("cpu"))
    mask = mask[..., s - t :, :] if isinstance(mask, Tensor) else None
    torch.compiler.reset()  # after so many others no more would be compiled
    attend = torch.compile(on_cpu(not_plainly), dynamic=False, backend=backend)
    # bf16 has 8 bits: torch's own attention has 2e-3 to 4e-3
    check(attend, b, heads, key_value_heads, t, s, d, mask, torch.bfloat16, 8e-3)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize(
    ("b", "heads", "key_value_heads", "t", "s", "d"),
    [(2, 4, 2, 384, 640, 16), (1, 3, 3, 800, 900, 32), (2, 8, 1, 96, 101, 8), (1, 2, 2, 769, 770, 64)],
)
def test_last_queries_of_a_row_without_a_mask(
    b: int, heads: int, key_value_heads: int, t: int, s: int, d: int, dtype: torch.dtype, most: float
) -> None:
    torch.manual_seed(0)
    check(on_cpu(not_plainly), b, heads, key_value_heads, t, s, d, None, dtype, most)


def check(
    attend: Callable[..., Tensor],
    b: int,
    heads: int,
    key_value_heads: int,
    t: int,
    s: int,
    d: int,
    mask: Tensor | None,
    dtype: torch.dtype,
    most: float,
) -> None:
    """Output and gradients against those in fp64; ``most`` is the largest relative error."""

    def draw(count: int, positions: int) -> Tensor:  # in the order that projections leave them in
        return torch.randn(b, positions, count, d).to(dtype).transpose(1, 2).requires_grad_()

    q, k, v = draw(heads, t), draw(key_value_heads, s), draw(key_value_heads, s)
    grad = draw(heads, t).detach()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    allowed = torch.ones(t, s, dtype=torch.bool).tril(s - t) if mask is None else mask
    expected = F.scaled_dot_product_attention(*exact, attn_mask=allowed, enable_gqa=True)
    expected.backward(grad.double())

    y = attend(q, k, v, mask)
    y.backward(grad)
    pairs = [(y, expected), *((x.grad, e.grad) for x, e in zip((q, k, v), exact, strict=True))]
    for found, wanted in pairs:
        assert found is not None
        assert wanted is not None
        assert found.shape == wanted.shape
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < most
