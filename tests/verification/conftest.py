"""What the tests of faults that ``verify --config`` finds share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from torchtitan_style.config import to_toml
from torchtitan_style.launch.configure import load_config
from torchtitan_style.verification.layout import reference
from torchtitan_style.verification.report import Check

Checks = dict[str, dict[str, Check]]
"""By fault and by name."""


@pytest.fixture(scope="module")
def find_faults(run_ranks, tmp_path_factory) -> Callable[[str, Sequence[str], int], Checks]:
    """Run a script of this folder as the ranks of a layout, and get what is checked under each of its faults."""

    def run(script: str, overrides: Sequence[str], world_size: int) -> Checks:
        folder = tmp_path_factory.mktemp("faults")
        config = load_config(Path("train_configs/qwen3.toml"), list(overrides), world_size=world_size)
        (folder / "config.toml").write_text(to_toml(config))
        reference(config, folder, device=torch.device("cpu"), rows=config.training.global_batch_size)
        run_ranks(Path(__file__).parent / script, world_size, folder)
        found = json.loads((folder / "checks.json").read_text())
        return {fault: {check["name"]: Check(**check) for check in each} for fault, each in found.items()}

    return run
