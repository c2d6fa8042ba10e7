"""The compiled attention on CPU in bf16 against attention in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_style.cpu.attention import with_fast_gradient
from torchtitan_style.models.qwen3.attention import attend


@pytest.mark.parametrize(
    ("b", "heads", "key_value_heads", "t", "s", "d"),
    [
        (2, 4, 2, 256, 256, 32),
        (1, 3, 3, 300, 300, 16),
        (2, 8, 1, 64, 64, 64),
        (1, 2, 1, 1025, 1025, 32),
        (2, 4, 2, 200, 500, 16),
    ],
)
def test_every_gradient_is_that_of_fp64(b: int, heads: int, key_value_heads: int, t: int, s: int, d: int) -> None:
    """The queries are those of the last t of s positions."""
    torch.manual_seed(0)

    def draw(count: int, positions: int) -> Tensor:  # in the order that projections leave them in
        return torch.randn(b, positions, count, d).bfloat16().transpose(1, 2).requires_grad_()

    q, k, v = draw(heads, t), draw(key_value_heads, s), draw(key_value_heads, s)
    grad = draw(heads, t).detach()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    allowed = torch.ones(t, s, dtype=torch.bool).tril(s - t)
    expected = F.scaled_dot_product_attention(*exact, attn_mask=allowed, enable_gqa=True)
    expected.backward(grad.double())

    y = torch.compile(with_fast_gradient(attend), dynamic=False)(q, k, v, None)
    y.backward(grad)
    pairs = [(y, expected), *((x.grad, e.grad) for x, e in zip((q, k, v), exact, strict=True))]
    for found, wanted in pairs:
        assert found is not None
        assert wanted is not None
        assert found.shape == wanted.shape
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < 8e-3  # bf16 has 8 bits: torch's own attention has 2e-3 to 4e-3
