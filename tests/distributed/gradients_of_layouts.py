"""Run by test_gradients.py as the ranks of one layout: loss and gradients against the plain model.

Arguments: dp_replicate dp_shard tp output.json combination ... For every combination of options, as in
eager/tied/none, the file gets the relative difference of the loss and of each parameter's gradient.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.tracing import traced
from torchtitan_style import Qwen3ForCausalLM
from torchtitan_style.config.layout import Layout
from torchtitan_style.config.schema import ActivationCheckpoint, Compile
from torchtitan_style.distributed.init import init_weights
from torchtitan_style.distributed.world import World, destroy_world, init_world
from torchtitan_style.models.qwen3.config import FLAVORS
from torchtitan_style.models.qwen3.parallelize import parallelize_qwen3
from torchtitan_style.train.stopping import ending_at_once

RECOMPUTE = {
    "none": ActivationCheckpoint(mode="none"),
    "full": ActivationCheckpoint(mode="full"),
    "op": ActivationCheckpoint(mode="selective"),
    "2": ActivationCheckpoint(mode="selective", selective_ac_option="2"),
    "budget": ActivationCheckpoint(mode="memory_budget", memory_budget=0.3),  # of the compiler
}
COMPILE = {
    "eager": Compile(enable=False),
    "block": Compile(enable=True),
    "traced": Compile(enable=True),  # as the compiler has it, run by torch's own kernels
}


def combinations(dp_replicate: int, dp_shard: int, tp: int) -> list[tuple[str, str, str]]:
    """(compile, embeddings, recomputation) for a layout.

    The embeddings are outside the blocks: graphs of blocks are the same with either kind, and each kind is compiled
    somewhere.
    """
    eager = list(itertools.product(("eager",), ("tied", "untied"), [kind for kind in RECOMPUTE if kind != "budget"]))
    if dp_replicate * dp_shard * tp > 2:
        return [*eager, ("block", "untied", "op")]
    blocks = [("block", "tied", "none"), ("block", "untied", "op"), ("block", "tied", "full"), ("block", "untied", "2")]
    if tp > 1:
        return [*eager, ("traced", "untied", "op"), *blocks]
    return [*eager, *blocks, ("block", "untied", "budget")]


def is_nightly(dp_replicate: int, dp_shard: int, tp: int, compile: str, embeddings: str, recompute: str) -> bool:
    """Whether the graphs are those of another combination, or differ in sizes alone. Uncompiled, what is recomputed is
    in the blocks, and which embeddings there are, outside.

    FSDP2 and copies are outside of all graphs, so that one process has those of any number: with FSDP2 one combination
    shows that blocks are wrapped after they are compiled. Tensor parallelism has its collectives in the graphs; there
    the compiler is also told what to recompute, and a graph is traced. With both kinds the graphs are those of two
    ranks, which four would compile at once.
    """
    if compile == "eager":
        return embeddings == "untied" and recompute != "none"
    if tp == 1:
        return dp_replicate > 1 or recompute != "none"
    return compile != "traced"


def batch(dp: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows a rank, so that layouts, pipelines and ``verify`` have graphs in common, which are compiled once. Labels
    are missing here and there, and more of them in some rows than in others."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 512, (2 * dp, 33), generator=generator)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    labels[torch.rand(labels.shape, generator=generator) < torch.linspace(0, 0.6, 2 * dp)[:, None]] = -100
    return inputs, labels


def build(tied: bool) -> Qwen3ForCausalLM:
    config = dataclasses.replace(FLAVORS["debug"], tie_word_embeddings=tied, attention_bias=True)
    return Qwen3ForCausalLM(config)


def compare(world: World, compile: str, embeddings: str, recompute: str) -> dict[str, float]:
    torch._dynamo.reset()
    inputs, labels = batch(world.layout.dp)
    tokens = (labels != -100).sum()

    plain = build(embeddings == "tied")
    init_weights(plain, seed=3, initial_std=plain.initial_std)
    plain_loss = plain(inputs, labels)[0] / tokens
    plain_loss.backward()

    with torch.device("meta"):
        model = build(embeddings == "tied")
    with traced() if compile == "traced" else contextlib.nullcontext():
        parallelize_qwen3(
            model,
            world.mesh,
            activation_checkpoint=RECOMPUTE[recompute],
            compile=COMPILE[compile],
            param_dtype=torch.float32,
            reduce_dtype=torch.float32,
            reshard_after_forward=True,
        )
    model.to_empty(device="cpu")
    model.tie_weights()
    init_weights(model, seed=3, initial_std=model.initial_std)
    rows = len(inputs) // world.layout.dp
    mine = slice(world.dp_rank * rows, (world.dp_rank + 1) * rows)
    loss_sum, right = model(inputs[mine], labels[mine])
    (loss_sum / tokens).backward()
    totals = torch.stack((loss_sum.detach() / tokens, right))
    dist.all_reduce(totals, group=world.dp_group)

    with torch.no_grad():
        plain_right = plain(inputs, labels)[1]
    differences = {
        "loss": ((totals[0] - plain_loss) / plain_loss).abs().item(),
        "right guesses": (totals[1] - plain_right).abs().item(),
    }
    theirs = dict(model.named_parameters())
    assert theirs.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        full, grad = whole(theirs[name]), whole(theirs[name].grad)
        assert torch.equal(full, parameter), f"{name} starts from other values"
        differences[name] = ((grad - parameter.grad).norm() / parameter.grad.norm()).item()
    return differences


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main() -> None:
    dp_replicate, dp_shard, tp = map(int, sys.argv[1:4])
    output, *names = sys.argv[4:]
    world = init_world(Layout(dp_replicate=dp_replicate, dp_shard=dp_shard, tp=tp), timeout_seconds=300)
    results = {name: compare(world, *name.split("/")) for name in names}
    if world.is_main:
        Path(output).write_text(json.dumps(results), encoding="utf-8")
    destroy_world()


if __name__ == "__main__":
    with ending_at_once():
        main()
