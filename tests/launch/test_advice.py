"""Warnings on what is allowed but probably not meant."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from torchtitan_style.checkpoint.folder import CheckpointFolder
from torchtitan_style.config import to_toml
from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.launch.advice import advice
from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.qwen3.config import FLAVORS


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A checkpoint of a model of other dimensions than the default."""
    folder = CheckpointFolder(tmp_path / "weights")
    temporary = folder.begin(1)
    dimensions = dataclasses.asdict(dataclasses.replace(FLAVORS["debug"], num_hidden_layers=3))
    lines = [f"{name} = {json.dumps(value)}" for name, value in dimensions.items() if value is not None]
    (temporary / "config.toml").write_text("[model]\n" + "\n".join(lines))
    folder.commit(1, {}, about={})
    return folder.path(1)


def advised(config: Path | None, *overrides: object) -> list[str]:
    options = list(map(str, overrides))
    return advice(config, options, load_config(config or DEFAULT_CONFIG, options))


def test_settings_of_the_default_file_are_named_when_other_weights_are_trained(weights: Path, tmp_path: Path) -> None:
    start = ["--checkpoint.initial_load_path", weights, "--job.dump_folder", tmp_path / "run"]
    [line] = advised(None, *start, "--training.seq_len", 128)
    assert "optimizer.lr = 0.003, optimizer.muon.adamw_lr = 0.032, data.dataset" in line
    [other] = advised(None, *start, "--optimizer.name", "adamw", "--optimizer.lr", 1e-4)
    assert "optimizer" not in other
    assert "seq_len" not in line  # the user has set it
    assert "model.flavor" not in line  # the default file has, not the user
    assert advised(DEFAULT_CONFIG, *start) == []  # chosen
    shutil.copytree(weights, tmp_path / "run/checkpoint/step-1")
    assert advised(None, *start) == []  # a run that has begun goes on from its own


def test_a_flavor_that_does_not_apply_is_named_if_the_user_has_set_it(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'[checkpoint]\ninitial_load_path = "{weights}"\n[job]\ndump_folder = "{tmp_path}/run"\n')
    assert advised(path) == []
    [line] = advised(path, "--model.flavor", "mini")
    assert line.startswith('model.flavor = "mini" does not apply')
    assert advised(path, "--model.flavor", "debug", "--model.num_hidden_layers", 3) == []
    path.write_text(to_toml(load_config(path)))  # names the default flavor, and all that overrides it
    assert advised(path) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            "warmup_steps = 10",
            ["lr_scheduler.warmup_steps = 10 does not end by step 10, the end of the run", "91%"],
        ),
        ("warmup_steps = 99\ndecay_ratio = 0.0", ["only reaches 10% of optimizer.lr"]),
        ("warmup_steps = 9", []),
        ("total_steps = 4", ["after step 4 the rate (optimizer.lr) is 0"]),
        ("total_steps = 4\nmin_lr_factor = 0.1", ["is 0.1 × optimizer.lr"]),
        ("total_steps = 4\ndecay_ratio = 0.0", []),
        ("warmup_steps = 5\ntotal_steps = 20", []),
        ("", []),
    ],
)
def test_schedules_that_do_not_fit_the_run(tmp_path: Path, settings: str, said: list[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'[training]\nsteps = 10\n[job]\ndump_folder = "{tmp_path}/run"\n[lr_scheduler]\n{settings}\n')
    lines = advised(path)
    assert len(lines) == bool(said)
    assert all(part in lines[0] for part in said)


def test_muons_own_schedule_too(tmp_path: Path) -> None:
    options = ["--optimizer.name", "muon", "--job.dump_folder", tmp_path / "run", "--training.steps", 100]
    assert advised(None, *options) == []
    [line] = advised(None, *options, "--optimizer.muon.warmup_steps", 100)
    assert line.startswith("optimizer.muon.warmup_steps = 100 does not end by step 100")
    assert "of optimizer.muon.lr" in line


@pytest.mark.parametrize(("steps", "warmup"), [(2, 0), (100, 10), (2000, 200), (50_000, 200)])
def test_warm_up_left_out_fits_the_run_and_is_written_out(tmp_path: Path, steps: int, warmup: int) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"[job]\n[training]\nsteps = {steps}\n")
    config = load_config(path)
    assert config.lr_scheduler.warmup_steps == warmup
    path.write_text(to_toml(config))
    assert load_config(path) == config
    assert load_config(path, ["--lr_scheduler.warmup_steps", "7"]).lr_scheduler.warmup_steps == 7
