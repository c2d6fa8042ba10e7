"""Products and attention in bf16 and fp16 by way of fp32, as on CPUs without instructions for them, against fp64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_style.common import device as devices
from torchtitan_style.cpu import half_precision

CPU = torch.device("cpu")
LAYOUTS = ["rows, rows", "rows, columns", "columns, rows", "columns, columns"]


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch: pytest.MonkeyPatch):
    """Whatever this machine has; and torch as it was, afterwards."""
    monkeypatch.setattr(half_precision, "is_fast", lambda dtype, device: False)
    monkeypatch.setattr(half_precision, "_slow", set())
    monkeypatch.setattr(half_precision, "_library", None)
    assert all(half_precision.multiply_in_fp32(dtype, CPU) for dtype in (torch.bfloat16, torch.float16))
    yield
    half_precision._library._destroy()


def matrix(n: int, m: int, layout: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, m).to(dtype) if layout == "rows" else torch.randn(m, n).to(dtype).T


def assert_rounded_once(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """found: of ``dtype``; exact: in fp64. Half of a last place, and fp32's own rounding before it."""
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("n", [1, 4, 5, 70])
def test_products_are_rounded_once(dtype: torch.dtype, layouts: str, n: int) -> None:
    torch.manual_seed(0)
    first, second = layouts.split(", ")
    a, b, c = matrix(n, 96, first, dtype), matrix(96, 80, second, dtype), torch.randn(80).to(dtype)
    exact = a.double() @ b.double()
    if n > 4 or second == "rows":  # torch's own loops may round in between
        assert_rounded_once(a @ b, exact, dtype)
        assert_rounded_once(torch.mm(a, b, out=torch.empty(n, 80, dtype=dtype)), exact, dtype)
        assert_rounded_once(torch.addmm(c, a, b), exact + c.double(), dtype)
    batch = a.expand(3, -1, -1), b.expand(3, -1, -1)
    assert_rounded_once(torch.bmm(*batch), exact.expand(3, -1, -1), dtype)
    assert_rounded_once(
        torch.baddbmm(c, *batch, beta=0.5, alpha=2), exact.expand(3, -1, -1) * 2 + c.double() / 2, dtype
    )
    torch.testing.assert_close(F.linear(a, b.T, c).double(), exact + c.double(), rtol=2e-2, atol=2e-2)


def test_fp32_is_left_to_torch() -> None:
    a, b = torch.randn(5, 6), torch.randn(6, 7)
    out = torch.empty(5, 7)
    assert torch.equal(torch.mm(a, b, out=out), a @ b)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.mm(a, a)
    with pytest.raises(RuntimeError):
        torch.mm(a, b.bfloat16())


@pytest.mark.parametrize("window", [None, 5])
def test_gradients_of_a_linear_layer_and_of_attention(window: int | None) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(6, 32).bfloat16().requires_grad_(), torch.randn(24, 32).bfloat16().requires_grad_()
    F.linear(x, w).sum().backward()
    ones = torch.ones(6, 24, dtype=torch.double)
    assert_rounded_once(x.grad, ones @ w.detach().double(), torch.bfloat16)
    assert_rounded_once(w.grad, ones.T @ x.detach().double(), torch.bfloat16)

    q, k, v = (torch.randn(2, heads, 33, 16).bfloat16().requires_grad_() for heads in (4, 2, 2))
    seen = torch.ones(33, 33).tril().bool()
    if window is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        seen &= torch.ones(33, 33).triu(1 - window).bool()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    weights = torch.randn(y.shape)
    (y.float() * weights).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    every = [exact[0], *(x.repeat_interleave(2, dim=1) for x in exact[1:])]
    scores = every[0] @ every[1].mT / 4
    scores = scores.masked_fill(~seen, float("-inf"))
    expected = scores.softmax(-1) @ every[2]
    (expected * weights).sum().backward()
    assert y.dtype == q.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
    for found, of in zip((q, k, v), exact, strict=True):
        # bf16's 4e-3 of the gradient and of y, which the gradient is taken from
        assert torch.dist(found.grad.double(), of.grad) < 1e-2 * of.grad.norm()


def test_a_compiled_graph_multiplies_as_one_that_is_not() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(40, 32).bfloat16(), torch.randn(32, 48).bfloat16()
    torch._dynamo.reset()
    found = torch.compile(lambda a, b: torch.relu(a @ b), dynamic=False)(a, b)
    assert_rounded_once(found, (a.double() @ b.double()).relu(), torch.bfloat16)


def test_a_gpu_is_left_alone() -> None:
    assert not half_precision.multiply_in_fp32(torch.bfloat16, torch.device("cuda"))


def test_this_cpu_is_asked_once_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, as torch warns only once."""
    source = (
        "import torch, warnings; warnings.simplefilter('error')\n"
        "from torchtitan_style.cpu import half_precision as h\n"
        "h.is_fast = lambda dtype, device: False\n"
        "assert all(h.multiply_in_fp32(torch.bfloat16, torch.device('cpu')) for _ in range(2))\n"
        "a = torch.ones(8, 8).bfloat16(); assert torch.equal(a @ a, 8 * a)\n"
    )
    root = Path(half_precision.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", source], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_utilisation_is_against_the_rate_of_what_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "is_fast", lambda dtype, device: dtype == torch.float32)
    multiplied = []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, dtype: multiplied.append(dtype) or ones(64, 64, dtype=dtype))
    assert devices.peak_flops(CPU, torch.bfloat16) > 0
    assert multiplied == [torch.float32]


def test_what_is_fast_is_what_onednn_multiplies() -> None:
    assert devices.is_fast(torch.bfloat16, CPU) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
