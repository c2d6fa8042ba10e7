"""Run by test_adapter_gradients.py as the ranks of one layout: a model with adapters against PEFT's.

Arguments: dp_replicate dp_shard tp folder output.json combination ... The folder has what PEFT has computed. For every
combination of options, as in eager/none, the file gets the relative difference of the loss and of each gradient.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtitan_style.checkpoint.saved import open_model
from torchtitan_style.checkpoint.weights import copy_local_part, load_weights
from torchtitan_style.config import Config
from torchtitan_style.config.layout import Layout
from torchtitan_style.data.loader import Batch, Microbatch
from torchtitan_style.distributed.local import local_tensor, whole_tensor
from torchtitan_style.distributed.world import World, destroy_world, init_world
from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.trained import is_adapter
from torchtitan_style.optim.guard import StepGuard
from torchtitan_style.train.step import build_optimizer, build_training_model, forward_backward, train_step
from torchtitan_style.train.stopping import ending_at_once

OPTIONS = {
    "eager": [],
    "compiled": ["--compile.enable"],
    "none": [],
    "full": ["--activation_checkpoint.mode", "full"],
    "op": ["--activation_checkpoint.mode", "selective"],
    "muon": ["--optimizer.name", "muon"],
}


def build(config: Config, world: World, base: Path) -> Any:
    model = build_training_model(config, world, warn=print)
    weights = {name: p for name, p in model.named_parameters() if not is_adapter(name)}
    load_weights(open_model(str(base), verify=False), weights)
    return model


def set_adapters(model: Any, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            assert parameter.dtype == torch.float32
            assert parameter.requires_grad
            copy_local_part(parameter.detach(), (), lambda where, name=name: values[name][where])
        else:
            assert not parameter.requires_grad, name


def share(world: World, rows: dict[str, Tensor]) -> Microbatch:
    count = len(rows["inputs"]) // world.layout.dp
    mine = slice(world.dp_rank * count, (world.dp_rank + 1) * count)
    return Microbatch(rows["inputs"][mine], rows["labels"][mine])


def starts_as_the_base(config: Config, world: World, base: Path, rows: Microbatch) -> bool:
    plain = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 0})})
    with torch.no_grad():
        found = [local_tensor(build(each, world, base)(rows.inputs)) for each in (plain, config)]
    return torch.equal(*found)


def compare(world: World, folder: Path, combination: str) -> dict[str, Any]:
    torch._dynamo.reset()
    options = [option for name in combination.split("/") for option in OPTIONS[name]]
    degrees = ["--parallelism.tensor_parallel_degree", str(world.layout.tp),
               "--parallelism.data_parallel_replicate_degree", str(world.layout.dp_replicate)]  # fmt: skip
    config = load_config(folder / "config.toml", [*options, *degrees], world_size=world.layout.world_size)
    rows, values = load_file(folder / "rows.safetensors"), load_file(folder / "adapters.safetensors")
    mine, base = share(world, rows), folder / "model"
    found: dict[str, Any] = {
        "starts as the base": config.compile.enable or starts_as_the_base(config, world, base, mine)
    }
    model = build(config, world, base)
    starts = {name: whole_tensor(p).clone() for name, p in model.named_parameters() if is_adapter(name)}
    found["initial"] = {name: p.double().square().sum().item() for name, p in starts.items()}
    set_adapters(model, values)
    tokens = (rows["labels"] != -100).sum()
    loss = forward_backward(model, [mine], tokens)
    dist.all_reduce(loss, group=world.dp_group)
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    found["loss"] = abs(loss.item() - expected["loss"]) / expected["loss"]
    gradients, right = {n: p.grad for n, p in model.named_parameters()}, load_file(folder / "gradients.safetensors")
    assert {name for name, gradient in gradients.items() if gradient is not None} == right.keys()
    found["gradients"] = {
        name: ((whole_tensor(gradients[name]) - value).norm() / value.norm()).item() for name, value in right.items()
    }
    found["losses"] = train(model, config, world, mine)
    return found


def train(model: Any, config: Config, world: World, rows: Microbatch) -> list[float]:
    optimizer = build_optimizer(model, config, world)
    held = [p for p in optimizer.state if isinstance(p, DTensor | Tensor)]
    assert sum(p.numel() for p in held) == sum(p.numel() for n, p in model.named_parameters() if is_adapter(n))
    guard, losses = StepGuard(0.0, 2, world.device), []
    for step in range(1, config.training.steps + 1):
        result = train_step(model, optimizer, Batch([rows], 0), step=step, config=config, world=world, guard=guard)
        losses.append(result.loss.item())
    return losses


def main() -> None:
    dp_replicate, dp_shard, tp = map(int, sys.argv[1:4])
    folder, output, *names = sys.argv[4:]
    world = init_world(Layout(dp_replicate=dp_replicate, dp_shard=dp_shard, tp=tp), timeout_seconds=300)
    results = {name: compare(world, Path(folder), name) for name in names}
    if world.is_main:
        Path(output).write_text(json.dumps(results), encoding="utf-8")
    destroy_world()


if __name__ == "__main__":
    with ending_at_once():
        main()
