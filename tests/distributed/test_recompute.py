"""Selective recomputation keeps what attention has computed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn.attention import flex_attention

from torchtitan_style.config.schema import ActivationCheckpoint
from torchtitan_style.distributed.recompute import apply_activation_checkpoint, set_memory_budget
from torchtitan_style.models.qwen3 import attention

OPERATIONS = ActivationCheckpoint(mode="selective", selective_ac_option="op")


class Block(nn.Module):
    def forward(self, x: Tensor, mask: Any) -> Tensor:
        q = x.sin()  # recomputed, as a norm is
        return attention.attend(q, q, q, mask).cos()


def test_flex_attention_is_not_run_again_in_a_compiled_block(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch refuses gradients on CPU, as it has no kernel for them there. The plain definition has.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    graphs: dict[str, Counter[Any]] = {}

    def noting(name: str) -> Any:
        def compiler(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
            graphs[name] = Counter(str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=noting("forward"),
        bw_compiler=noting("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    block = Block()
    set_memory_budget(OPERATIONS, device_type="cpu", collectives=False)  # as a run does: another test's may be set
    apply_activation_checkpoint([block], OPERATIONS)
    mask = attention.attention_mask(
        torch.zeros(1, 128, dtype=torch.int), 128, None, flex=True, device=torch.device("cpu")
    )
    x = torch.randn(1, 2, 128, 16, requires_grad=True)
    torch.compile(block.forward, backend=backend)(x, mask).sum().backward()
    assert graphs["forward"]["flex_attention"] == 1
    assert graphs["backward"]["aten.sin.default"] >= 1  # something is recomputed
    assert graphs["backward"]["flex_attention"] == 0 < graphs["backward"]["flex_attention_backward"]


calls: list[str] = []


@torch.library.custom_op("test_recompute::sinh", mutates_args=())
def counted_sinh(x: Tensor) -> Tensor:
    calls.append("sinh")
    return x.sinh()


counted_sinh.register_fake(torch.empty_like)
counted_sinh.register_autograd(
    lambda ctx, grad: grad * ctx.saved_tensors[0].cosh(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_what_is_compiled_within_an_uncompiled_block_is_not_run_again(how: str) -> None:
    """As FlexAttention is there, whose kernel for gradients no CPU has."""
    inner = attention._compiled(counted_sinh) if how == "compiled" else counted_sinh
    block = nn.Module()
    block.forward = lambda x: inner(x.sin()).cos()
    apply_activation_checkpoint([block], OPERATIONS)
    x = torch.randn(8, requires_grad=True)
    calls.clear()
    block(x).sum().backward()
    assert len(calls) == (1 if how == "compiled" else 2)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, -x.sin().sinh().sin() * x.sin().cosh() * x.cos())
