"""Run by test_expert_gradients.py as the ranks of one layout: loss and gradients against the loop over experts.

Arguments: dp_replicate dp_shard tp ep output.json combination…. For each combination the file gets the relative
difference of the losses, of the gradients' norm and of each parameter's gradient, the bytes of tokens sent and, where
blocks are compiled, for how many reasons their graphs are interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from tests.tracing import traced
from torchtitan_style.config.layout import Layout
from torchtitan_style.config.schema import ActivationCheckpoint, Compile
from torchtitan_style.data.loader import Microbatch
from torchtitan_style.distributed.experts import expert_mesh
from torchtitan_style.distributed.init import init_weights
from torchtitan_style.distributed.local import whole_tensor
from torchtitan_style.distributed.world import World, destroy_world, init_world
from torchtitan_style.models.build import build_model
from torchtitan_style.models.qwen3_moe.config import FLAVORS
from torchtitan_style.models.qwen3_moe.experts import Experts, loop_over_experts
from torchtitan_style.models.qwen3_moe.spec import QWEN3_MOE
from torchtitan_style.optim.clip import clip_grad_norm_
from torchtitan_style.train.balance import Balance
from torchtitan_style.train.step import forward_backward
from torchtitan_style.train.stopping import ending_at_once

RECOMPUTE = {
    "none": ActivationCheckpoint(mode="none"),
    "full": ActivationCheckpoint(mode="full"),
    "op": ActivationCheckpoint(mode="selective"),
}
# The losses of the router as large as others, so that a part of them that is missing shows.
CONFIG = dataclasses.replace(
    FLAVORS["debug"],
    num_hidden_layers=3,
    mlp_only_layers=(1,),
    router_aux_loss_coef=0.5,
    router_z_loss_coef=0.1,
    initializer_range=0.2,
    attention_bias=True,  # as in test_gradients.py
)


def combinations(dp_replicate: int, dp_shard: int, tp: int, ep: int) -> list[tuple[str, ...]]:
    """(compile, recomputation, "one" if there is one microbatch) for a layout. compile: eager, block, or traced: as the
    compiler has it, run by torch's own kernels.

    One microbatch is not routed beforehand, which the compiler would make graphs of their own for.
    """
    eager = [("eager", kind) for kind in RECOMPUTE]
    if dp_replicate > 1:
        return eager
    return [*eager, ("block", "none", "one"), ("traced", "op"), ("block", "none"), ("block", "op")]


def is_nightly(dp_replicate: int, dp_shard: int, tp: int, ep: int, *combination: str) -> bool:
    """Whether another combination shows most of it: each recomputation is tried on one process; what is sent, and what
    is compiled around it, on two that share the experts. tests/models traces a block of one process."""
    compile, recompute, *_ = combination
    if compile == "eager":
        return recompute == "full" and dp_replicate * dp_shard * tp > 1
    if compile == "traced":
        return dp_shard * tp > 1
    return combination != ("block", "none", "one") or (dp_shard, tp, ep) != (2, 1, 2)


def batch(dp: int, microbatches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two rows a rank, so that the graphs of attention are those of test_gradients.py; more labels are missing in
    later rows."""
    rows = 2 * microbatches * dp
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 512, (rows, 33), generator=generator)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    labels[torch.rand(labels.shape, generator=generator) < torch.linspace(0, 0.6, rows)[:, None]] = -100
    return inputs, labels


def draw(model: Any) -> None:
    init_weights(model, seed=3, initial_std=model.initial_std)


def by_definition(inputs: torch.Tensor, labels: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The whole batch at once in one process: model with gradients, loss, and Transformers' auxiliary loss."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    model = build_model(QWEN3_MOE, CONFIG, device=torch.device("cpu"), fill=draw)
    logits: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            module.run = loop_over_experts
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _m, _i, output: logits.append(output[0]))
    loss = model(inputs, labels)[0] / (labels != -100).sum()
    aux_loss = load_balancing_loss_func(tuple(logits), CONFIG.num_experts, CONFIG.num_experts_per_tok)
    z_loss = torch.stack([layer.logsumexp(-1).square().mean() for layer in logits]).mean()
    (loss + CONFIG.router_aux_loss_coef * aux_loss + CONFIG.router_z_loss_coef * z_loss).backward()
    return model, loss.detach(), aux_loss.detach()


def compare(world: World, compile: str, recompute: str, microbatches: str = "two") -> dict[str, float]:
    torch._dynamo.reset()
    counters.clear()
    inputs, labels = batch(world.layout.dp, {"one": 1, "two": 2}[microbatches])
    plain, plain_loss, plain_aux_loss = by_definition(inputs, labels)

    def lay_out(model: Any) -> None:
        QWEN3_MOE.parallelize(
            model,
            world.mesh,
            expert_mesh=MESH,
            activation_checkpoint=RECOMPUTE[recompute],
            compile=Compile(enable=compile != "eager"),
            param_dtype=torch.float32,
            reduce_dtype=torch.float32,
            reshard_after_forward=True,
        )

    with traced() if compile == "traced" else contextlib.nullcontext():
        model = build_model(QWEN3_MOE, CONFIG, device=torch.device("cpu"), lay_out=lay_out, fill=draw)
    each = len(inputs) // world.layout.dp
    rows = slice(world.dp_rank * each, (world.dp_rank + 1) * each)
    parts = [Microbatch(*part) for part in zip(inputs[rows].split(2), labels[rows].split(2), strict=True)]
    sent = count_bytes()
    balance = Balance.of(model, parts, world)
    loss = forward_backward(model, parts, (labels != -100).sum(), balance)
    dist.all_reduce(loss, group=world.dp_group)
    sums = balance.sums()
    experts = CONFIG.num_experts
    counts, probabilities = sums[:, :experts].sum(0), sums[:, experts : 2 * experts].sum(0)
    aux_loss = experts * (counts * probabilities).sum() / balance.rows**2
    differences = {
        "loss": ((loss - plain_loss) / plain_loss).abs().item(),
        "aux loss": ((aux_loss - plain_aux_loss) / plain_aux_loss).abs().item(),
    }
    theirs = dict(model.named_parameters())
    assert theirs.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        assert torch.equal(whole_tensor(theirs[name]), parameter), f"{name} starts from other values"
        grad = whole_tensor(theirs[name].grad)
        differences[name] = ((grad - parameter.grad).norm() / parameter.grad.norm()).item()
    right = torch.stack([p.grad.double().square().sum() for p in plain.parameters()]).sum().sqrt()
    norm = clip_grad_norm_(model.parameters(), float("inf"))
    interrupted = {"interruptions": len(counters["graph_break"])} if compile != "eager" else {}
    return differences | interrupted | {"norm": ((norm - right) / right).abs().item(), "bytes": sent[0]}


def count_bytes() -> list[int]:
    """Counts, from now on, the bytes of hidden states that this rank sends to others to have them computed there."""
    from torchtitan_style.models.qwen3_moe import expert_parallel

    original, sent = ORIGINAL, [0]

    def counting(rows: torch.Tensor, to: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        others = sum(to) - to[dist.get_rank(group)]
        sent[0] += others * rows.shape[1] * rows.element_size()
        return original(rows, to, received, group)

    expert_parallel._all_to_all = counting
    return sent


def main() -> None:
    global MESH, ORIGINAL
    dp_replicate, dp_shard, tp, ep = map(int, sys.argv[1:5])
    output, *names = sys.argv[5:]
    world = init_world(Layout(dp_replicate=dp_replicate, dp_shard=dp_shard, tp=tp, ep=ep), timeout_seconds=300)
    from torchtitan_style.models.qwen3_moe.expert_parallel import _all_to_all

    MESH, ORIGINAL = expert_mesh(world), _all_to_all
    results = {name: compare(world, *name.split("/")) for name in names}
    for result in results.values():
        total = torch.tensor(result["bytes"])
        dist.all_reduce(total)
        result["bytes"] = total.item()
    if world.is_main:
        Path(output).write_text(json.dumps(results), encoding="utf-8")
    destroy_world()


if __name__ == "__main__":
    with ending_at_once():
        main()
