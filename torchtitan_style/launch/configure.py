"""Read the configuration of a run, complete it, and check it as a whole. Needs no torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtitan_style.checkpoint.saved import SavedModel, find_checkpoint, open_model
from torchtitan_style.common.errors import UserError
from torchtitan_style.common.extensions import import_modules
from torchtitan_style.common.reading import toml_of
from torchtitan_style.config import Config
from torchtitan_style.config.checks import Problem, cross_checks
from torchtitan_style.config.help import section_help
from torchtitan_style.config.layout import fit_local_batch, plan_layout
from torchtitan_style.config.load import Draft
from torchtitan_style.config.schema import Job, Model
from torchtitan_style.models.checks import model_problems
from torchtitan_style.models.registry import model_names, spec_of
from torchtitan_style.models.section import schema_of

ELASTIC = "TORCHTITAN_STYLE_ELASTIC"
"""Environment variable that a launcher sets for its ranks if the number of hosts may change."""


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = 1, is_elastic: bool = False
) -> Config:
    """Read ``path``, apply ``overrides`` (as on the command line), check it all.

    path: of a file, or the name of a shipped configuration, as "qwen3_8b".
    world_size: number of processes; None: not known yet, so the degrees are not held against it.
    is_elastic: the number of processes may change: training.local_batch_size is lowered where it does not fit.

    Raises UserError with every problem found: syntax, unknown keys, wrong types, impossible values
    and combinations.
    """
    draft = Draft(path, overrides)
    import_modules(draft.peek_list("job", "custom_import"))
    spec = spec_of(_family(draft))
    schema = schema_of(spec)
    draft.apply_overrides(schema)
    _adopt_weights(draft)
    config = draft.checked(schema)
    if is_elastic and world_size is not None:
        config = fit_to_ranks(config, world_size)
    draft.add([*model_problems(config, spec), *cross_checks(config, world_size)])
    draft.raise_problems()
    return _with_warmup(config)


def fit_to_ranks(config: Config, world_size: int) -> Config:
    """``config`` with training.local_batch_size lowered so that the global batch can be shared out, if it can be."""
    try:
        local = fit_local_batch(config.training, plan_layout(config.parallelism, world_size).dp)
    except ValueError:
        return config  # the checks say why
    return config.model_copy(update={"training": config.training.model_copy(update={"local_batch_size": local})})


def _with_warmup(config: Config) -> Config:
    """``config`` with the warm-up written out, so that the config.toml of a run shows it."""
    schedule = config.lr_scheduler
    warmup = schedule.warmup(config.training.steps)
    return config.model_copy(update={"lr_scheduler": schedule.model_copy(update={"warmup_steps": warmup})})


def help_of(name: str) -> str:
    """What ``--help SECTION`` and ``--help SECTION.KEY`` print; ``model.FAMILY`` for another model family's keys.

    Raises UserError if there is no such section.
    """
    section, _, family = name.removeprefix("--").strip("[]").partition(".")
    if section != "model" or family not in model_names():
        family = Model().name
    else:
        name = section
    text = section_help(name, schema_of(spec_of(family)))
    others = [f"--help model.{other}" for other in model_names() if other != family]
    if name == "model" and others:
        text += f"\n\nThe keys of other families: {', '.join(others)}"
    return text


def _family(draft: Draft) -> str:
    """The model family that is asked for; the default one if there is none of that name, which the schema says."""
    name = draft.peek("model", "name")
    return name if name in model_names() else Model().name


def _adopt_weights(draft: Draft) -> None:
    """Fill in what comes with the weights that a run starts from: dimensions and tokenizer.

    What the user has set stays, but that a tokenizer be trained: the weights know theirs only. A run
    that has checkpoints goes on from those, and needs what it started from no more.
    """
    tree = draft.tree
    sections = {name: tree.get(name, {}) for name in ("model", "checkpoint", "data", "job")}
    if not all(isinstance(section, dict) for section in sections.values()):
        return
    for section, name in (("model", "hf_assets_path"), ("checkpoint", "initial_load_path")):
        source = sections[section].get(name)
        if not isinstance(source, str) or not source:
            continue
        try:
            own = _own_checkpoint(sections["job"])
            found = own or open_model(source, verify=False)
        except UserError as error:
            draft.problems.append(Problem((f"{section}.{name}",), str(error)))
            return
        dimensions = dataclasses.asdict(found.config)
        in_toml = {name: list(value) if isinstance(value, tuple) else value for name, value in dimensions.items()}
        tree["model"] = in_toml | sections["model"]
        has_trained_one = own is not None and _trained_a_tokenizer(own)
        if found.tokenizer and not has_trained_one and sections["data"].get("tokenizer", "train") == "train":
            tree["data"] = sections["data"] | {"tokenizer": source}
        return


def _own_checkpoint(job: dict[str, Any]) -> SavedModel | None:
    """A checkpoint of the run itself, if there is one that says what model it is."""
    folder = job.get("dump_folder", Job().dump_folder)
    try:
        path = find_checkpoint(Path(os.path.expanduser(folder)), verify=False)
        return SavedModel(path) if path else None
    except (UserError, TypeError, OSError, ValueError):
        return None


def _trained_a_tokenizer(checkpoint: SavedModel) -> bool:
    """Whether the run that has written ``checkpoint`` was told to, if that can be read."""
    try:
        data = toml_of(checkpoint.path / "config.toml").get("data")
        return isinstance(data, dict) and data.get("tokenizer") == "train"
    except (OSError, ValueError):
        return False
