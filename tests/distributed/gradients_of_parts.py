"""Run by test_context_gradients.py as the ranks of one layout: loss and gradients of rows that are shared out over the
cp axis, against the plain model, which sees each document alone.

Arguments: dp_shard cp tp output.json combination ... For every combination of options, as in eager/tied/documents, the
file gets the relative difference of the loss and of each parameter's gradient.
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

from tests.tracing import traced
from torchtitan_style.config.layout import Layout
from torchtitan_style.config.schema import ActivationCheckpoint, Compile
from torchtitan_style.cpu import attention
from torchtitan_style.data.loader import Microbatch
from torchtitan_style.distributed.context import Context
from torchtitan_style.distributed.init import init_weights
from torchtitan_style.distributed.world import World, destroy_world, init_world
from torchtitan_style.models.qwen3.attention import document_positions
from torchtitan_style.models.registry import spec_of
from torchtitan_style.train.stopping import ending_at_once

ROW = 264
"""Positions of a row: a multiple of 2 · 2 · 2."""
DOCUMENTS = [[1, 2, 3, 251, 7], [ROW], [2, 130, 132], [131, 1, 1, 1, 130]]
"""Lengths of the documents in each row."""


def lengths(kind: str) -> list[list[int]]:
    return DOCUMENTS if kind.startswith("documents") else [[ROW]] * len(DOCUMENTS)


def model_of(embeddings: str, kind: str) -> tuple[Any, Any]:
    """Spec and configuration. kind: documents or none, with -window or -experts behind it."""
    _, _, more = kind.partition("-")
    spec = spec_of("qwen3_moe" if more == "experts" else "qwen3")
    changes: dict[str, Any] = {"tie_word_embeddings": embeddings == "tied"}
    if more == "window":  # in one layer of two, shorter than a span, so that some keys are left out
        changes |= {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}
    return spec, dataclasses.replace(spec.flavors["debug"], **changes)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 512, (len(DOCUMENTS), ROW + 1), generator=generator)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    return inputs, labels


def plain_gradients(spec: Any, config: Any, kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    inputs, labels = rows()
    model = spec.build(config)
    init_weights(model, seed=3, initial_std=model.initial_std)
    tokens, loss = (labels != -100).sum(), 0.0
    for row, sizes in enumerate(lengths(kind)):
        for ids, wanted in zip(inputs[row, None].split(sizes, 1), labels[row, None].split(sizes, 1), strict=True):
            share = model(ids, wanted)[0] / tokens
            share.backward()
            loss += share.item()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def compare(world: World, compile: str, embeddings: str, kind: str, recompute: str = "none") -> dict[str, float]:
    """compile: eager, compiled, or traced: as the compiler has it, run by torch's own kernels."""
    torch._dynamo.reset()
    attention.FEWEST_ROWS = 1 if embeddings == "untied" else 768  # so that keys before a span are a call of their own
    spec, config = model_of(embeddings, kind)
    plain_loss, plain = plain_gradients(spec, config, kind)
    with torch.device("meta"):
        model = spec.build(config)
    with traced() if compile == "traced" else contextlib.nullcontext():
        spec.parallelize(
            model,
            world.mesh,
            activation_checkpoint=ActivationCheckpoint(mode=recompute),
            compile=Compile(enable=compile != "eager"),
            param_dtype=torch.float32,
            reduce_dtype=torch.float32,
            reshard_after_forward=True,
            context=Context.of(world.cp_group),
            **({"expert_mesh": None} if spec.expert_parallel else {}),
        )
    model.to_empty(device="cpu")
    model.tie_weights()
    init_weights(model, seed=3, initial_std=model.initial_std)
    inputs, labels = rows()
    documents = torch.stack([torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in lengths(kind)])
    batch = Microbatch(inputs, labels)
    if kind.startswith("documents"):
        batch = Microbatch(inputs, labels, documents, document_positions(documents))
    each = len(inputs) // world.layout.dp
    mine = slice(world.dp_rank * each, (world.dp_rank + 1) * each)
    part = Microbatch(*(None if x is None else x[mine] for x in batch)).of_part(world.part)
    share = model(*part)[0] / (labels != -100).sum()
    share.backward()
    loss = share.detach().clone()
    dist.all_reduce(loss, group=world.batch_group)
    found = {"loss": abs(loss.item() - plain_loss) / plain_loss}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.full_tensor()
        found[name] = ((gradient - plain[name]).norm() / plain[name].norm()).item()
    assert len(found) == len(plain) + 1
    return found


def main() -> None:
    dp, cp, tp = map(int, sys.argv[1:4])
    output, *names = sys.argv[4:]
    world = init_world(Layout(dp_shard=dp, cp=cp, tp=tp), timeout_seconds=300)
    results = {name: compare(world, *name.split("/")) for name in names}
    if world.is_main:
        Path(output).write_text(json.dumps(results), encoding="utf-8")
    destroy_world()


if __name__ == "__main__":
    with ending_at_once():
        main()
