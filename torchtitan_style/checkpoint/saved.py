"""Where weights come from: a model folder in Transformers' format, or a checkpoint of ours.

Opening one tells its dimensions and its tokenizer, without torch; ``weights.py`` reads the weights.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from torchtitan_style.common.errors import UserError, cut
from torchtitan_style.common.hub import fetch
from torchtitan_style.common.reading import name_problem, toml_of
from torchtitan_style.common.typed import Content, problem_in, typed
from torchtitan_style.config.schema import Lora
from torchtitan_style.models.hf_folder import HFFolder
from torchtitan_style.models.registry import spec_of
from torchtitan_style.models.section import schema_of

from .base import Base
from .folder import CheckpointFolder
from .manifest import MANIFEST, problem_of

T = TypeVar("T")

_TRIES = 10
"""Checkpoints that are tried one after the other while a run goes on."""


class _Settings(Content):
    """What must be in the config.toml of a checkpoint."""

    model: dict[str, Any] = Field(min_length=1)
    lora: dict[str, Any] = Field(default_factory=dict)


class SavedModel:
    """The model in one checkpoint of ours: all its weights, or adapters of others. Raises UserError if the checkpoint
    does not say what it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            settings = typed(_Settings, toml_of(path / "config.toml"))
            model = settings.model
            self.spec = spec_of(str(model.get("name", "qwen3")))
            names = [field.name for field in fields(self.spec.config_class)]
            # Other keys of the section, which newer and older versions have, are no concern of the shape.
            dimensions = {name: model[name] for name in names if name in model}
            type(schema_of(self.spec)().model).model_validate(dimensions)
            if missing := set(self.spec.shape_fields) - dimensions.keys():
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            self.config = self.spec.config_class(**dimensions)
            self.lora = Lora.model_validate(settings.lora)
            """With a rank of 0 there are no adapters."""
        except ValidationError as error:
            raise UserError(f"{path}: its config.toml does not describe a model: {problem_in(error)}") from None
        except (OSError, ValueError, UserError) as error:
            raise UserError(f"{path}: its config.toml does not describe a model: {error}") from None

    @functools.cached_property
    def base(self) -> HFFolder | SavedModel:
        """The weights that its adapters belong to; not verified. Raises UserError if they are not there."""
        return open_base(self, verify=False)

    @property
    def assets(self) -> Path:
        """Where the tokenizer's files are, if there are any, and where generation stops."""
        return self.path / "tokenizer"

    @property
    def tokenizer(self) -> Path | None:
        """Where its tokenizer's files are, or None if it has none."""
        return self.assets if (self.assets / "tokenizer.json").is_file() else None

    def check(self, config: Any = None) -> None:
        """Raise UserError unless the weights fit a model of ``config``."""
        config = config or self.config
        if type(config) is not type(self.config):
            raise UserError(f"{self.path}: it is a {self.spec.name} model; set model.name to that")
        for name in self.spec.shape_fields:
            mine, wanted = getattr(self.config, name), getattr(config, name)
            if mine != wanted:
                raise UserError(f"{self.path}: its model.{name} is {mine}, not {wanted}")


def open_model(
    source: str,
    *,
    verify: bool,
    say: Callable[[str], None] = lambda line: None,
    advance: Callable[[], None] = lambda: None,
) -> HFFolder | SavedModel:
    """A run folder (its newest verified checkpoint), one checkpoint, or a model folder by path or Hub name.

    verify: make sure that the files are whole, also of the weights that adapters belong to, and fetch weights that are
    on the Hub; without it a look at the dimensions costs no time. say: told of checkpoints that were passed over.
    advance: called as verification gets on, from any thread.

    Raises UserError, saying what is wrong with ``source``.
    """
    folder = Path(os.path.expanduser(source))  # Path.expanduser raises for a user that there is not
    if problem := name_problem(folder):
        raise UserError(f"{cut(source, 200)}: {problem}")
    if (checkpoint := find_checkpoint(folder, verify=verify, say=say, advance=advance)) is not None:
        saved = SavedModel(checkpoint)
        if saved.lora.rank and verify:
            saved.base = open_base(saved, verify=True, say=say, advance=advance)
        return saved
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(
            f"{source} holds neither checkpoints nor a model: it has no {MANIFEST}, no checkpoint/step-N "
            "and no config.json" + _unfinished(folder)
        )
    model = HFFolder(fetch(source, weights=verify))
    if verify:
        model.check()
    return model


def open_base(
    adapted: SavedModel,
    source: str = "",
    *,
    verify: bool,
    say: Callable[[str], None] = lambda line: None,
    advance: Callable[[], None] = lambda: None,
) -> HFFolder | SavedModel:
    """The weights that the adapters in ``adapted`` belong to.

    source: where they are, if not where they were. verify: as of ``open_model``, and that they are the same as then.

    Raises UserError if they are not there, or have changed.
    """
    record = Base.read(adapted.path)
    place = source or record.source
    if place == record.source and Path(record.path).exists():
        place = record.path
    try:
        found = open_model(place, verify=verify, say=say, advance=advance)
        found.check(adapted.config)
    except UserError as error:
        raise UserError(f"{adapted.path}: the weights that its adapters belong to cannot be used: {error}") from None
    if verify and (change := record.change(found, advance=advance)):
        raise UserError(
            f"{adapted.path}: its adapters were trained on other weights than those now in {place}: {change}; restore "
            f"the weights of {record.source} that the run started from"
        )
    return found


def with_model(source: str, use: Callable[[HFFolder | SavedModel], T], *, say: Callable[[str], None]) -> T:
    """``use`` of the verified model in ``source``; of the next checkpoint if a run deletes this one meanwhile.

    Raises UserError as ``open_model`` does.
    """

    def steps() -> list[int]:
        checkpoints = CheckpointFolder.within(Path(os.path.expanduser(source)))
        return checkpoints.steps() if checkpoints else []

    for _ in range(_TRIES):
        before = steps()
        try:
            return use(open_model(source, verify=True, say=say))
        except BaseException as error:  # DCP's are no Exceptions
            if isinstance(error, KeyboardInterrupt | SystemExit) or steps() == before:
                raise
    raise UserError(f"{source}: its checkpoints are deleted while they are read; raise checkpoint.keep_latest_k")


def find_checkpoint(
    folder: Path,
    *,
    verify: bool,
    say: Callable[[str], None] = lambda line: None,
    advance: Callable[[], None] = lambda: None,
) -> Path | None:
    """The checkpoint that ``folder`` is, or the newest (verified) of those it holds; None if there are none.

    Raises UserError if it is a damaged one, or none of them is whole.
    """
    if (folder / MANIFEST).is_file():
        if verify and (problem := problem_of(folder, advance=advance)):
            raise UserError(f"{folder}: {problem}")
        return folder
    checkpoints = CheckpointFolder.within(folder, advance=advance)
    if checkpoints is None:
        return None
    step = checkpoints.newest_verified(say) if verify else checkpoints.steps()[0]
    if step is None:
        raise UserError(f"{checkpoints.root}: none of its {len(checkpoints.steps())} checkpoints is whole")
    return checkpoints.path(step)


def _unfinished(folder: Path) -> str:
    """A hint, if a save was cut short here."""
    if folder.name.startswith("tmp-") or (folder / ".metadata").exists():
        return "; a checkpoint without its manifest was never finished"
    if any(folder.glob("tmp-step-*")) or any(folder.glob("checkpoint/tmp-step-*")):
        return "; its only checkpoint was never finished"
    return ""
