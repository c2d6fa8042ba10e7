"""Warnings, before a run starts, about settings that are valid but probably unintended."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torchtitan_style.checkpoint.folder import CheckpointFolder
from torchtitan_style.config.files import CONFIG_FOLDER, DEFAULT_CONFIG, find_config
from torchtitan_style.config.load import read_settings
from torchtitan_style.config.schema import Config, LRScheduler
from torchtitan_style.models.registry import model_config, spec_of

_OF_THE_MODEL = (
    "optimizer.lr",
    "optimizer.muon.adamw_lr",
    "data.dataset",
    "training.seq_len",
    "training.steps",
    "training.global_batch_size",
    "lr_scheduler.warmup_steps",
)
"""Settings of the default configuration that only fit its small model."""


def advice(path: str | Path | None, overrides: Sequence[str], config: Config) -> list[str]:
    """Warnings on a checked configuration, one string each.

    path: the file that the user named, None for the default; it and ``overrides`` tell what the user has set.
    """
    own = read_settings(path, overrides, type(config))
    found = list(_schedules(config))
    has_begun = bool(CheckpointFolder(Path(config.job.dump_folder) / "checkpoint").steps())
    if config.initial_weights and not has_begun:
        shipped = path is not None and find_config(path).resolve().parent == CONFIG_FOLDER.resolve()
        found += _flavor((read_settings(None, overrides, type(config)) if shipped else own).get("model", {}), config)
        if path is None:
            found += _taken_from_default(own, config)
    return found


def _taken_from_default(own: dict[str, Any], config: Config) -> Iterator[str]:
    default, values = read_settings(DEFAULT_CONFIG, (), type(config)), config.model_dump()
    if model_config(config.model) == spec_of(default["model"]["name"]).flavors[default["model"]["flavor"]]:
        return
    taken = []
    for key in _OF_THE_MODEL:
        value = _at(values, key)
        if _at(default, key) is not None and _at(own, key) is None and value is not None:
            taken.append(f"{key} = {json.dumps(value)}")
    if taken:
        yield (
            f"starting from the weights of {config.initial_weights} with settings of the default configuration, which "
            f"are meant for a model of 5 M parameters: {', '.join(taken)}. Set them, or name a configuration "
            "(--config qwen3_0.6b_finetune is one for fine-tuning)"
        )


def _at(settings: dict[str, Any], key: str) -> Any:
    """What ``settings`` have at "section.key"; None if nothing."""
    for name in key.split("."):
        settings = settings.get(name, {})
    return None if settings == {} else settings


def _flavor(own: dict[str, Any], config: Config) -> Iterator[str]:
    flavor = own.get("flavor")
    if flavor is None:
        return
    shape = model_config(config.model)
    dimensions = dataclasses.asdict(shape)
    wanted = dataclasses.asdict(spec_of(config.model.name).flavors[flavor]) | {
        name: own[name] for name in dimensions if name in own
    }
    if wanted != dimensions:
        yield f'model.flavor = "{flavor}" does not apply: the dimensions are those of {config.initial_weights}'


def _schedules(config: Config) -> Iterator[str]:
    steps = config.training.steps
    yield from _schedule("lr_scheduler", "optimizer.lr", config.lr_scheduler, steps)
    if config.optimizer.name == "muon":
        schedule = config.optimizer.muon.schedule(config.lr_scheduler)
        if schedule != config.lr_scheduler:
            section = "lr_scheduler" if config.optimizer.muon.warmup_steps is None else "optimizer.muon"
            yield from _schedule(section, "optimizer.muon.lr", schedule, steps)


def _schedule(section: str, rate: str, schedule: LRScheduler, steps: int) -> Iterator[str]:
    total, warmup = schedule.total_steps or steps, schedule.warmup(steps)
    constant = schedule.decay_ratio == 0
    rising = steps if constant else min(steps, total)
    if warmup >= rising:
        yield (
            f"{section}.warmup_steps = {warmup:,} does not end by step {rising:,}, the end of the "
            f"{'run' if rising == steps else 'schedule'}: the rate only reaches "
            f"{rising / (warmup + 1):.0%} of {rate}"
        )
    if total < steps and not constant:
        lowest = f"{schedule.min_lr_factor:g} × {rate}" if schedule.min_lr_factor else "0"
        yield (
            f"lr_scheduler.total_steps = {total:,} is less than training.steps = {steps:,}: after step {total:,} "
            f"the rate ({rate}) is {lowest}"
        )
