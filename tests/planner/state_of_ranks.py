"""Run by test_state.py as ranks: the tensors that each rank really holds, in many layouts.

Arguments: a file with the cases as JSON, the folder for what each rank finds.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import Layout
from torchtitan_style.distributed.gloo import one_thread_each
from torchtitan_style.distributed.local import local_tensor
from torchtitan_style.distributed.world import init_world
from torchtitan_style.launch.configure import load_config
from torchtitan_style.train.step import build_optimizer, build_training_model
from torchtitan_style.train.stopping import ending_at_once


def size(tensors: Any) -> int:
    return sum(local.numel() * local.element_size() for local in map(local_tensor, tensors))


def found(case: dict[str, Any]) -> dict[str, Any]:
    layout = Layout(**case["layout"])
    config = load_config(DEFAULT_CONFIG, case["overrides"], world_size=layout.world_size)
    world = init_world(layout, timeout_seconds=60)
    model = build_training_model(config, world, warn=print)
    optimizer = build_optimizer(model, config, world)
    parameters = dict(model.named_parameters())
    return {
        "weights": size(parameters.values()),
        "gradients": size(p.float() for p in parameters.values() if p.requires_grad),
        "optimizer": size(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)),
        "local": {name: list(local_tensor(parameter).shape) for name, parameter in parameters.items()},
    }


@one_thread_each()
def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    results = [found(case) for case in cases]
    (Path(sys.argv[2]) / f"{os.environ['RANK']}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()  # rank 0 has the store, which others may still need
    dist.destroy_process_group()


if __name__ == "__main__":
    with ending_at_once():
        main()
