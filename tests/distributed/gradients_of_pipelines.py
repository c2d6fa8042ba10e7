"""Run by test_pipeline.py as the ranks of one layout: loss and gradients of pipelines against the plain model.

Arguments: pp dp_replicate dp_shard cp tp output.json case ... For every case, as in 1F1B/tied/eager/documents/2, the
file gets the relative difference of the loss and of each parameter's gradient, and more that is wrong if it is not 0.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from torchtitan_style.config import Config
from torchtitan_style.config.layout import Layout, plan_batch
from torchtitan_style.data.loader import Microbatch
from torchtitan_style.distributed.init import init_weights
from torchtitan_style.distributed.world import World, destroy_world, init_world
from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.registry import model_config, spec_of
from torchtitan_style.optim.clip import clip_grad_norm_
from torchtitan_style.planner.traffic import traffic_of
from torchtitan_style.planner.workload import Workload
from torchtitan_style.train.balance import Balance
from torchtitan_style.train.step import build_training_model, evaluating, forward_backward
from torchtitan_style.train.stopping import ending_at_once
from torchtitan_style.verification.layout import global_batch

EP = "--parallelism.expert_parallel_degree"


def config_of(case: str, layout: Layout) -> Config:
    schedule, embeddings, compiled, documents, layers, *more = case.split("/")
    return load_config(
        "qwen3",
        [
            "--model.flavor", "debug", "--model.num_hidden_layers", layers,
            "--model.tie_word_embeddings", str(embeddings == "tied").lower(), "--model.attention_bias",
            "--training.seq_len", "32", "--training.local_batch_size", "2",
            "--training.global_batch_size", str(8 * layout.dp),
            "--training.mixed_precision_param", "float32", "--training.seed", "3",
            "--compile.enable", str(compiled == "compiled").lower(),
            "--data.document_mask", str(documents == "documents").lower(),
            "--parallelism.pipeline_parallel_degree", str(layout.pp),
            "--parallelism.pipeline_parallel_schedule", schedule,
            "--parallelism.data_parallel_replicate_degree", str(layout.dp_replicate),
            "--parallelism.context_parallel_degree", str(layout.cp),
            "--parallelism.tensor_parallel_degree", str(layout.tp),
            *more,
        ],
        world_size=layout.world_size,
    )  # fmt: skip


def compare(world: World, case: str) -> dict[str, float]:
    torch._dynamo.reset()
    config = config_of(case, world.layout)
    plan = plan_batch(config.training, world.layout.dp)
    batch = global_batch(config, rows=plan.global_batch_size)
    tokens = (batch.labels != -100).sum()

    spec = spec_of(config.model.name)
    plain = spec.build(model_config(config.model))
    if spec.use_definition:
        spec.use_definition(plain)
    init_weights(plain, seed=3, initial_std=plain.initial_std)
    plain.lm_head.z_loss = config.training.z_loss
    logits: list[torch.Tensor] = []
    for name, module in plain.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _m, _i, output: logits.append(output[0]))
    loss_sum, right = plain(*batch)
    aux_loss, router_loss = losses_of_routers(plain.config, logits)
    (loss_sum / tokens + router_loss).backward()

    model = build_training_model(config, world, warn=print)
    share = plan.global_batch_size // world.layout.dp
    mine = slice(world.dp_rank * share, (world.dp_rank + 1) * share)
    rows = [[None] * plan.accumulation_steps if x is None else x[mine].split(plan.local_batch_size) for x in batch]
    microbatches = [Microbatch(*parts).of_part(world.part) for parts in zip(*rows, strict=True)]
    found = {}
    with evaluating(model):
        validated = torch.stack([torch.stack([x.double() for x in model(*part)]) for part in microbatches]).sum(0)
    dist.all_reduce(validated)
    sent: list[int] = []
    with patch.object(dist, "P2POp", counting(sent)):
        balance = Balance.of(model, microbatches, world)
        loss_share = forward_backward(model, microbatches, tokens, balance) * world.counts
    if balance is not None:
        sums, experts = balance.sums(), plain.config.num_experts
        counts, probabilities = sums[:, :experts].sum(0), sums[:, experts : 2 * experts].sum(0)
        found["aux loss"] = abs((experts * (counts * probabilities).sum() / balance.rows**2 / aux_loss).item() - 1)
        chosen = [torch.bincount(each.topk(plain.config.num_experts_per_tok).indices.flatten()) for each in logits]
        mine = [layer.nonzero().flatten().tolist() for layer in sums[:, :experts]]
        found["experts of layers"] = float(mine != [each.nonzero().flatten().tolist() for each in chosen])
    passes = ("forward", "backward")
    planned = [t for t in traffic_of(work_of(config, world)) if t.axis == "pp" and t.phase in passes]
    found["sends"] = abs(len(sent) - plan.accumulation_steps * sum(each.count for each in planned))
    found["bytes sent"] = abs(sum(sent) - plan.accumulation_steps * sum(each.bytes for each in planned))
    norm = clip_grad_norm_(model.parameters(), float("inf"), beside=loss_share)
    plain_norm = torch.stack([p.grad.double().square().sum() for p in plain.parameters()]).sum().sqrt()
    found["loss"] = abs(loss_share.item() / (loss_sum / tokens).item() - 1)
    found["norm"] = abs(norm.item() / plain_norm.item() - 1)
    if not config.training.z_loss:
        found["validation loss"] = abs((validated[0] / world.layout.tp / loss_sum).item() - 1)
    found["right guesses"] = abs((validated[1] / world.layout.tp - right).item())

    theirs = dict(model.named_parameters())
    everyone: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everyone, set(theirs))
    expected = dict(plain.named_parameters())
    found["names"] = len(set().union(*everyone) ^ set(expected))
    for name, parameter in theirs.items():
        full, grad = whole(parameter), whole(parameter.grad)
        found[f"weights of {name}"] = float(not torch.equal(full, expected[name]))
        found[name] = ((grad - expected[name].grad).norm() / expected[name].grad.norm()).item()
    of_ranks: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, found)
    return {name: max(each.get(name, 0.0) for each in of_ranks) for each in of_ranks for name in each}


def losses_of_routers(shape: Any, logits: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Transformers' auxiliary loss, and with the z-loss what is added to the loss; 0 without experts."""
    if not logits:
        return torch.zeros(()), torch.zeros(())
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    aux_loss = load_balancing_loss_func(tuple(logits), shape.num_experts, shape.num_experts_per_tok)
    z_loss = torch.stack([layer.logsumexp(-1).square().mean() for layer in logits]).mean()
    return aux_loss.detach(), shape.router_aux_loss_coef * aux_loss + shape.router_z_loss_coef * z_loss


def counting(sent: list[int]) -> Any:
    """In the place of ``dist.P2POp``: adds the bytes of each tensor that is sent to ``sent``."""
    real = dist.P2POp

    def make(op: Any, tensor: torch.Tensor, *args: Any, **named: Any) -> Any:
        if op is dist.isend:
            sent.append(tensor.nbytes)
        return real(op, tensor, *args, **named)

    return make


def work_of(config: Config, world: World) -> Workload:
    return Workload.of_ranks(config, world.layout, on_gpu=False)[world.stage]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def with_experts(world: World, case: str) -> World:
    """``world`` with the expert parallelism of a case: no axis of its own."""
    _, given, degree = case.partition(f"{EP}/")
    return dataclasses.replace(world, layout=dataclasses.replace(world.layout, ep=int(degree))) if given else world


def main() -> None:
    pp, dp_replicate, dp_shard, cp, tp = map(int, sys.argv[1:6])
    output, *cases = sys.argv[6:]
    layout = Layout(pp=pp, dp_replicate=dp_replicate, dp_shard=dp_shard, cp=cp, tp=tp)
    world = init_world(layout, timeout_seconds=300)
    results = {case: compare(with_experts(world, case), case) for case in cases}
    if world.is_main:
        Path(output).write_text(json.dumps(results), encoding="utf-8")
    destroy_world()


if __name__ == "__main__":
    with ending_at_once():
        main()
