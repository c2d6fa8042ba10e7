"""How much memory a run needs: the arithmetic, against the tensors of the model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.memory import Room, gpu_memory
from torchtitan_style.config import Config
from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import Layout
from torchtitan_style.launch import preflight
from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.qwen3.model import Qwen3ForCausalLM
from torchtitan_style.models.registry import model_config
from torchtitan_style.planner.memory import plan_memory

ALONE = Layout(dp_replicate=1, dp_shard=1, tp=1)


def loaded(*overrides: str, world_size: int = 1) -> Config:
    return load_config(DEFAULT_CONFIG, overrides, world_size=world_size)


@pytest.mark.parametrize("flavor", ["debug", "0.6B", "8B"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_is_that_of_the_parameters(flavor: str, optimizer: str) -> None:
    config = loaded("--model.flavor", flavor, "--optimizer.name", optimizer)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(model_config(config.model))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    in_muon = {n for n, p in model.named_parameters() if optimizer == "muon" and p.ndim == 2 and "layers" in n}
    moments = sum(p.numel() * (1 if n in in_muon else 2) for n, p in model.named_parameters())
    steps = len(dict(model.named_parameters())) - len(in_muon)  # AdamW counts them for each parameter
    plan = plan_memory(config, ALONE, on_gpu=False)
    assert plan.state.weights == plan.state.gradients == 4 * numbers
    assert plan.state.optimizer == 4 * (moments + steps)
    assert plan.moments["at the loss"]["copies"] == 2 * numbers  # bf16
    fp32 = loaded("--training.mixed_precision_param", "float32")
    assert plan_memory(fp32, ALONE, on_gpu=False).moments["at the loss"]["copies"] == 0


def test_layouts_share_it_out() -> None:
    config = loaded("--model.flavor", "0.6B", "--training.local_batch_size", "1")
    whole = plan_memory(config, ALONE)
    for dp, tp in ((8, 1), (1, 8), (4, 2)):
        part = plan_memory(config, Layout(dp_replicate=1, dp_shard=dp, tp=tp))
        # Norms, which tensor parallelism does not split, are 1e-4 of the weights.
        assert part.state.total == pytest.approx(whole.state.total / 8, rel=1e-3)
        assert part.total < whole.total
    assert plan_memory(config, Layout(dp_replicate=8, dp_shard=1, tp=1)).state == whole.state


def test_accumulated_gradients_stay_whole_until_they_are_summed() -> None:
    layout = Layout(dp_shard=8)
    cases = ("8", "last_microbatch", 0), ("16", "last_microbatch", 4), ("16", "each_microbatch", 4 / 8)
    for batch, when, expected in cases:
        config = loaded("--model.flavor", "0.6B", "--training.local_batch_size", "1",
                        "--parallelism.fsdp_reduce_gradients", when,
                        "--training.global_batch_size", batch, world_size=8)  # fmt: skip
        gradients = plan_memory(config, layout).moments["at the loss"]["gradients"]
        assert gradients == pytest.approx(expected * model_config(config.model).num_parameters, rel=1e-3)


@pytest.mark.parametrize(
    ("total", "free", "ranks", "outcome"),
    [
        (100e9, 100e9, 1, ""),
        (100e9, 10e9, 1, "warning: training takes about"),
        (12e9, 12e9, 1, "warning: training takes about"),  # room for the state, not for what comes on top
        (15e9, 15e9, 1, "warning: training takes about"),  # room for fewer rows at once
        (9e9, 9e9, 1, "refused"),
        (15e9, 15e9, 2, "refused"),  # replicated twice in the memory of one host
    ],
)
def test_a_run_without_room_is_refused_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, total: float, free: float, ranks: int, outcome: str
) -> None:
    monkeypatch.setattr(preflight, "host_memory", lambda: Room(int(total), int(free)))
    # 0.6 G parameters of 16 bytes: 9.5 GB. With all that a step adds 15.5.
    config = loaded("--model.flavor", "0.6B", "--optimizer.name", "adamw")
    said: list[str] = []
    layout = Layout(dp_replicate=ranks, dp_shard=1, tp=1)
    if outcome == "refused":
        with pytest.raises(UserError, match=r"at least .* optimizer state .*, but it has .* smaller model"):
            preflight.check_memory(config, layout, said.append, ranks_here=ranks, on_gpus=False)
    else:
        preflight.check_memory(config, layout, said.append, ranks_here=ranks, on_gpus=False)
    assert len(said) == (outcome.startswith("warning"))
    assert all(line.startswith(outcome) for line in said)
    if total == 15e9 and ranks == 1:
        assert "; this fits: --parallelism" in said[0]
    if total == 12e9:
        assert "no layout of that many processes fits" in said[0]


def test_ranks_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "gpu_memory", lambda: Room(80 * 10**9, 80 * 10**9))
    said: list[str] = []
    config, layout = loaded("--model.flavor", "4B"), Layout(dp_replicate=8, dp_shard=1, tp=1)
    preflight.check_memory(config, layout, said.append, ranks_here=8, on_gpus=True)
    assert said == []


def test_memory_of_gpus_is_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '81559, 80000'\necho '81559, 512'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu_memory() == Room(81559 * 2**20, 512 * 2**20)
    program.write_text("#!/bin/sh\necho '[N/A], [N/A]'\n")
    assert gpu_memory() is None
