"""``verify``: compare a model with Transformers, or a training layout with one process.

python -m torchtitan_style verify --hf Qwen/Qwen3-0.6B
python -m torchtitan_style verify --config train_configs/qwen3.toml --parallelism.tensor_parallel_degree 2
"""

from __future__ import annotations

import os
from pathlib import Path

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.reporting import reported_errors
from torchtitan_style.config import Config
from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import least_world_size
from torchtitan_style.launch.configure import load_config
from torchtitan_style.launch.preflight import check_schedule, check_torch
from torchtitan_style.launch.torchrun import count_gpus, start_ranks
from torchtitan_style.models.hf_folder import HFFolder
from torchtitan_style.models.spec import describe_size

from .cli import Arguments, hf_folder

USAGE = """\
usage: python -m torchtitan_style verify --hf DIR_OR_REPO [--dtype TYPE]
       python -m torchtitan_style verify [--config FILE] [--section.key VALUE ...] [--world-size N]

Print a table of what was compared and the largest differences. Exits with 1 if one is too large.

  --hf DIR_OR_REPO      compare a model with Transformers: parameters, logits, greedy text, loss, gradients
  --dtype TYPE          to compute in, float32 or bfloat16; float32 if left out

  --config FILE         compare a training layout with one process in fp32: loss, gradients, later losses
  --section.key VALUE   override a key of it, as in --parallelism.tensor_parallel_degree 2
  --world-size N        processes to start on this machine; the product of the degrees if left out, where
                        data_parallel_shard_degree = -1 counts as 2

  --tolerance X         largest relative difference, instead of the defaults (docs/numerics.md)
"""


def main(arguments: list[str]) -> None:
    with reported_errors():
        parser = Arguments(USAGE)
        parser.add_argument("--hf")
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
        parser.add_argument("--config")
        parser.add_argument("--world-size", type=int)
        parser.add_argument("--tolerance", type=float)
        options, overrides = parser.parse_known(arguments)
        check_torch()
        right = True
        if options.hf:
            right = _verify_hf(hf_folder(options.hf), options.dtype, options.tolerance)
        if options.config or overrides or options.world_size is not None or not options.hf:
            config, world_size = _load(options.config, overrides, options.world_size)
            right = _verify_layout(config, world_size, options.tolerance) and right
        print("\neverything agrees" if right else "\nNOT everything agrees")
        raise SystemExit(0 if right else 1)


def _verify_hf(folder: HFFolder, dtype: str, tolerance: float | None) -> bool:
    import torch
    import transformers

    from torchtitan_style.common.device import current_device, name
    from torchtitan_style.verification.against_hf import compare_with_transformers
    from torchtitan_style.verification.report import print_checks

    device = current_device()
    checks = compare_with_transformers(folder, dtype=getattr(torch, dtype), device=device, tolerance=tolerance)
    print(f"{folder.path}, {describe_size(folder.config)}, on {name(device)}")
    return print_checks(f"against Transformers {transformers.__version__} in {dtype}", checks)


def _load(path: str | None, overrides: list[str], world_size: int | None) -> tuple[Config, int]:
    """The configuration, and how many processes it is verified on."""
    file = path or DEFAULT_CONFIG
    if world_size is None:
        world_size = least_world_size(load_config(file, overrides, world_size=None).parallelism, shards=2)
    if world_size < 1:
        raise UserError(f"--world-size: must be at least 1, not {world_size}")
    return load_config(file, overrides, world_size=world_size), world_size


def _verify_layout(config: Config, world_size: int, tolerance: float | None) -> bool:
    from torchtitan_style.verification.report import print_checks
    from torchtitan_style.verification.run import compare_layout

    check_schedule(config)
    on_gpus = count_gpus() >= world_size

    def start(folder: Path) -> None:
        if not on_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        arguments = [str(folder), *([] if tolerance is None else [str(tolerance)])]
        module = "torchtitan_style.commands.verify_rank"
        start_ranks(module, arguments, nproc=world_size, on_gpus=on_gpus)

    right = True
    for precision, checks in compare_layout(config, world_size, on_gpus=on_gpus, start=start, say=print).items():
        right = print_checks(f"\ncomputing in {precision}", checks) and right
    return right
