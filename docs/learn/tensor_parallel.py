"""A small Qwen3 over two tensor-parallel ranks: whose gradients are right, and from when on.

torchrun --nproc-per-node 2 docs/learn/tensor_parallel.py
"""

from __future__ import annotations

import logging
import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # gloo on the CPU, even where there are GPUs

import torch
import torch.distributed as dist

from torchtitan_style import Qwen3ForCausalLM
from torchtitan_style.config.layout import Layout
from torchtitan_style.config.schema import ActivationCheckpoint, Compile
from torchtitan_style.distributed.local import whole_tensor
from torchtitan_style.distributed.world import destroy_world, init_world
from torchtitan_style.models.qwen3.config import FLAVORS
from torchtitan_style.models.qwen3.model import RMSNorm
from torchtitan_style.models.qwen3.parallelize import parallelize_qwen3

CONFIG = FLAVORS["debug"]


def main() -> None:
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # how gradients are gathered below
    world = init_world(Layout(tp=2), timeout_seconds=60)
    torch.manual_seed(0)
    plain = Qwen3ForCausalLM(CONFIG)
    torch.manual_seed(0)  # the same weights on both ranks; parallelize keeps each rank's slices
    model = Qwen3ForCausalLM(CONFIG)
    parallelize_qwen3(
        model,
        world.mesh,
        activation_checkpoint=ActivationCheckpoint(),
        compile=Compile(),
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        reshard_after_forward=True,
    )
    summands = watch_norms(model)

    ids = torch.randint(0, CONFIG.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    for each in (plain, model):
        loss, _ = each(ids[:, :-1], ids[:, 1:])
        loss.backward()

    agree = 0
    for (name, expected), parameter in zip(plain.named_parameters(), model.parameters(), strict=True):
        found = whole_tensor(parameter.grad)
        if name in summands and world.is_main:
            alone, summed = difference(summands[name], expected.grad), difference(found, expected.grad)
            print(f"{name:<48} rank 0 alone is off by {alone:4.0%}   summed over tp: {summed:.4%}")
        agree += difference(found, expected.grad) < 1e-5
    assert agree == len(list(plain.parameters()))
    if world.is_main:
        print(f"all {agree} gradients agree")
    destroy_world()


def watch_norms(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradient that this rank finds for each norm's weight, before it is summed; filled by the backward pass."""
    found: dict[str, torch.Tensor] = {}

    def watch(name: str, norm: RMSNorm) -> None:
        read = norm.read_weight
        assert read is not None  # NormOfShard has set it

        def read_and_watch(weight: torch.Tensor) -> torch.Tensor:
            local = read(weight)
            local.register_hook(lambda grad: found.update({name: grad.clone()}))
            return local

        norm.read_weight = read_and_watch

    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            watch(f"{name}.weight", module)
    return found


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in norm."""
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    assert dist.is_torchelastic_launched() or "RANK" in os.environ, "start this with torchrun --nproc-per-node 2"
    main()
