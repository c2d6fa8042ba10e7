"""What a run and the checkpoint it resumes from must have in common, and what may differ. Needs no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchtitan_style.checkpoint.folder import CheckpointFolder
from torchtitan_style.common.errors import UserError
from torchtitan_style.common.reading import toml_of
from torchtitan_style.common.typed import typed
from torchtitan_style.config import Config
from torchtitan_style.config.files import flat
from torchtitan_style.config.layout import plan_batch, plan_streams
from torchtitan_style.models.registry import model_config

from .state import SavedState

Identity = dict[str, dict[str, Any]]

REPLACEABLE = ("weights", "tokenizer", "content")
"""What checkpoint.allow_changed_data lets change."""


def identity(config: Config, *, dp: int) -> Identity:
    """The settings that must stay the same for the whole run; ``RunData.identity`` adds what depends on the data."""
    shape = dataclasses.asdict(model_config(config.model))
    changeable = ("attention_dropout", "dropout", "initializer_range", "max_position_embeddings")
    for name in (*changeable, "router_aux_loss_coef", "router_z_loss_coef"):
        shape.pop(name, None)
    # One entry, which checkpoints from before there was YaRN do not have.
    rope = {name: shape.pop(name) for name in [*shape] if name.startswith("rope_") and name != "rope_theta"}
    rope["original_max_position_embeddings"] = shape.pop("original_max_position_embeddings", 0)
    shape["rope"] = None if rope.get("rope_type", "default") == "default" else rope
    shape = {name: list(value) if isinstance(value, tuple) else value for name, value in shape.items()}  # as in JSON
    data, streams, lora = config.data, None, config.lora
    if data.streaming:
        streams = plan_streams(data, plan_batch(config.training, dp).global_batch_size, dp)
    return {
        "model": shape,
        "training": {
            "seq_len": config.training.seq_len,
            "seed": config.training.seed,
            "freeze": config.training.freeze or None,
        },
        "lora": {key: getattr(lora, key) if lora.rank else None for key in ("rank", "alpha", "target_modules")},
        "optimizer": {"name": _optimizer_name(config)},
        "data": {
            "streaming": data.streaming,
            "packing": data.packing,
            "num_streams": streams,
            "corpora": list(data.corpora()),
            "weights": data.weights(),
        },
    }


def _optimizer_name(config: Config) -> str:
    """NorMuon has state that a checkpoint of Muon lacks."""
    name = config.optimizer.name
    return f"{name} with normuon_beta2" if config.optimizer.muon.normuon_beta2 else name


def check_same_run(saved: Identity, now: Identity, config: Config, checkpoint: Path) -> list[str]:
    """Compare two identities. Returns a sentence for each difference that the configuration allows.

    Raises UserError with every difference that it does not allow.
    """
    allowed, differences = [], []
    for section, key, before, after in _differences(saved, now):
        if section == "optimizer" and config.checkpoint.switch_optimizer:
            allowed.append(f"the optimizer was {before}; {after} starts afresh")
        elif section == "data" and key in REPLACEABLE and config.checkpoint.allow_changed_data:
            allowed.append(f"{key} of the data changed; continuing at the same position in the new data")
        else:
            differences.append((section, key, f"{section}.{key} was {before}, is {after}"))
    if not differences:
        return allowed
    hint = ""
    if all(section == "optimizer" for section, _, _ in differences):
        hint = ", allow it with --checkpoint.switch_optimizer"
    elif all(section == "data" and key in REPLACEABLE for section, key, _ in differences):
        hint = ", continue at the same position in the new data with --checkpoint.allow_changed_data"
    raise UserError(
        f"{checkpoint} belongs to a different run: {'; '.join(text for *_, text in differences)}; restore the "
        f"setting{hint}, or start a new run with another --job.dump_folder"
    )


def _differences(saved: Identity, now: Identity) -> Iterator[tuple[str, str, Any, Any]]:
    for section, values in now.items():
        for key, value in values.items():
            before = saved.get(section, {}).get(key)
            if before != value:
                yield section, key, before, value


def check_before_start(config: Config, *, dp: int) -> None:
    """Compare the configuration with the checkpoint that the run would resume from, as far as possible without
    reading the data. Raises UserError if it belongs to a different run."""
    folder = CheckpointFolder(Path(config.job.dump_folder) / "checkpoint")
    wanted = config.checkpoint.load_step
    if not config.checkpoint.enable or wanted == 0:
        return
    for step in folder.steps():
        if wanted not in (-1, step):
            continue
        try:
            saved = typed(SavedState, folder.train_state(step)).identity
        except (OSError, ValueError):
            continue  # damaged: verification will say so
        check_same_run(saved, identity(config, dp=dp), config, folder.path(step))
        return


def changed_settings(checkpoint: Path, config: Config) -> list[str]:
    """Settings that differ from those of ``checkpoint``, as "optimizer.lr 0.001 → 0.0005"."""
    try:
        before = flat(toml_of(checkpoint / "config.toml"))
    except (OSError, ValueError):
        return []
    now = flat(config.model_dump(exclude_none=True))
    # Dimensions that the flavor decides are written out there, and are part of the run's identity.
    keys = [key for key in now | before if key.partition(".")[0] != "model" or key in now]
    return [
        f"{key} {json.dumps(before.get(key))} → {json.dumps(now.get(key))}"
        for key in keys
        if before.get(key) != now.get(key)
    ]
