"""Products of compiled graphs on CPU: the same results, from matrices in rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from torchtitan_style.cpu.operands import OperandsInRows

aten = torch.ops.aten


def rewritten(function: Callable[..., Any], *inputs: Tensor, tracing_mode: str = "fake") -> GraphModule:
    module = make_fx(function, tracing_mode=tracing_mode)(*inputs)
    OperandsInRows()(module.graph)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def operands_by_columns(module: GraphModule) -> list[tuple[bool, ...]]:
    """Of each product, which of its two operands is read by columns."""
    products = [n for n in module.graph.nodes if n.target in (aten.mm.default, aten.bmm.default)]
    return [tuple(x.meta["val"].stride(-1) != 1 for x in product.args) for product in products]


def copies(graph: Graph) -> int:
    return sum("force_stride_order" in str(node.target) for node in graph.nodes)


def matrix(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("out_features", [64, 600])
def test_weight_gradient(out_features: int) -> None:
    x, grad = matrix(300, 256), matrix(300, out_features)

    def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
        return torch.mm(grad.permute(1, 0), x)

    module = rewritten(weight_gradient, grad, x)
    assert operands_by_columns(module) == [(False, False)]
    got = module(grad, x)
    assert got.is_contiguous()
    torch.testing.assert_close(got, weight_gradient(grad, x))


def test_one_copy_of_an_input_serves_all_its_products() -> None:
    x, *grads = matrix(300, 128), matrix(300, 512), matrix(300, 400), matrix(300, 600)
    module = rewritten(lambda x, *grads: [torch.mm(grad.permute(1, 0), x) for grad in grads], x, *grads)
    assert copies(module.graph) == 1 + len(grads)  # the input, and each gradient turned back
    for got, grad in zip(module(x, *grads), grads, strict=True):
        torch.testing.assert_close(got, grad.T @ x)


def test_batches() -> None:
    scores, keys = matrix(3, 160, 256), matrix(3, 256, 32)
    module = rewritten(lambda p, q: torch.bmm(p.permute(0, 2, 1), q), scores, matrix(3, 160, 32))
    assert operands_by_columns(module) == [(False, False)]
    torch.testing.assert_close(module(scores, matrix(3, 160, 32)), scores.mT @ matrix(3, 160, 32))
    queries = matrix(3, 160, 32)
    module = rewritten(lambda q, k: torch.bmm(q, k.permute(0, 2, 1)), queries, keys)
    assert operands_by_columns(module) == [(False, False)]
    torch.testing.assert_close(module(queries, keys), queries @ keys.mT)


@pytest.mark.parametrize(
    "operands",
    [
        (matrix(300, 256, dtype=torch.float32), matrix(300, 64, dtype=torch.float32)),  # oneDNN's fp32 has no such rate
        (matrix(300, 256), matrix(300, 256)),  # squares gain nothing
    ],
)
def test_what_is_left_alone(operands: tuple[Tensor, Tensor]) -> None:
    module = rewritten(lambda a, b: torch.mm(a.permute(1, 0), b), *operands)
    assert copies(module.graph) == 0


def test_open_sizes_are_left_alone() -> None:
    operands = matrix(300, 256), matrix(300, 64)
    module = rewritten(lambda a, b: torch.mm(a.permute(1, 0), b), *operands, tracing_mode="symbolic")
    assert copies(module.graph) == 0


def test_the_compiler_does_as_the_graph_says() -> None:
    """A linear layer's gradients through torch.compile, with the rewriting seen to take place."""
    seen: list[int] = []

    class Counting(OperandsInRows):
        def __call__(self, graph: Graph) -> None:
            super().__call__(graph)
            seen.append(copies(graph))

        def uuid(self) -> Any:
            return None  # compiled anew each time

    x, weight, grad = matrix(256, 64), matrix(192, 64), matrix(256, 192)
    linear = torch.compile(torch.nn.functional.linear, dynamic=False)
    with inductor_config.patch(post_grad_custom_post_pass=Counting()):
        ours = torch.autograd.grad(linear(x.requires_grad_(), weight.requires_grad_()), (x, weight), grad)
    assert sum(seen) == 2
    theirs = torch.autograd.grad(torch.nn.functional.linear(x, weight), (x, weight), grad)
    torch.testing.assert_close(ours, theirs)
