"""Matrix products of compiled graphs on CPU, with operands in the order in which oneDNN reads them fast.

A product in bf16 takes about twice the time if its first matrix has to be read by columns. That is so for every
gradient of a linear layer's weight, gradientᵀ · input, and for attention's gradients of keys and values; with small
matrices also if it is the second, as in scores, queries · keysᵀ. Copying the smaller matrix costs a tenth of what that
takes (measured: docs/performance.md). torch leaves the operands as they come.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.inductor_prims import force_stride_order
from torch.fx import Graph, Node

_aten = torch.ops.aten
_SWAP = {2: [1, 0], 3: [0, 2, 1]}  # of the last two dimensions, for mm and bmm


class OperandsInRows(CustomGraphPass):
    """Rewrites a graph of ATen operations, in place; for torch._inductor.config.post_grad_custom_post_pass."""

    def __call__(self, graph: Graph) -> None:
        copies: dict[Node, Node] = {}

        def in_rows(transposed: Node) -> Node:
            """A copy, one for all products with the same matrix."""
            matrix = transposed.args[0]
            assert isinstance(matrix, Node)
            if matrix not in copies:
                copies[matrix] = _copied_in_rows(graph, transposed)
            return copies[matrix]

        for product in [node for node in graph.nodes if node.target in (_aten.mm.default, _aten.bmm.default)]:
            value = product.meta["val"]
            if value.device.type != "cpu" or value.dtype != torch.bfloat16:
                continue
            first, second = product.args  # [..., N, K] and [..., K, M]
            sizes = (*first.meta["val"].shape, *second.meta["val"].shape)
            if not all(isinstance(size, int) for size in sizes):  # left open, in a graph for all of them
                continue
            n, m = value.shape[-2:]
            with graph.inserting_before(product):
                # For squares below 1024 oneDNN is no faster with rows.
                if _is_transposed(first) and (max(n, m) >= 2 * min(n, m) or min(n, m) >= 1024):
                    if n <= m:
                        other = _call(graph, product.target, in_rows(first), second)
                    else:  # (secondᵀ · firstᵀ)ᵀ: the first matrix is the smaller one there
                        turned = _call(graph, product.target, in_rows(_transpose(graph, second)), first.args[0])
                        other = _copied_in_rows(graph, _transpose(graph, turned))
                elif value.ndim == 3 and n >= 128 and _is_transposed(second):
                    other = _call(graph, product.target, first, in_rows(second))
                else:
                    continue
            product.replace_all_uses_with(other)
            graph.erase_node(product)

    def uuid(self) -> bytes:
        """What torch keeps compiled graphs by, beside their operations."""
        return get_hash_for_files((__file__,))


def _is_transposed(x: Node) -> bool:
    """Whether the last two dimensions of ``x`` are those of a matrix in rows, swapped."""
    if x.target is not _aten.permute.default:
        return False
    return x.args[1] == _SWAP.get(x.meta["val"].ndim) and x.args[0].meta["val"].stride(-1) == 1  # type: ignore[union-attr]


def _transpose(graph: Graph, x: Node) -> Node:
    return _call(graph, _aten.permute.default, x, _SWAP[x.meta["val"].ndim])


def _copied_in_rows(graph: Graph, x: Node) -> Node:
    # Neither clone nor contiguous would do: the compiler is free in how it lays out their results.
    return _call(
        graph, force_stride_order, x, torch.empty_like(x.meta["val"], memory_format=torch.contiguous_format).stride()
    )


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*(x.meta["val"] if isinstance(x, Node) else x for x in args))
    return node
