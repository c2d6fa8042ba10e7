"""Model families by name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from torchtitan_style.common.errors import UserError
from torchtitan_style.config.schema import Model

from .qwen3.spec import QWEN3
from .qwen3_moe.spec import QWEN3_MOE
from .spec import ModelSpec

__all__ = ["model_config", "model_names", "read_hf_config", "register_model", "spec_of"]

_SPECS = {spec.name: spec for spec in (QWEN3, QWEN3_MOE)}


def register_model(spec: ModelSpec) -> None:
    """Make ``spec`` known under its name. Raises UserError if another family has that name."""
    if _SPECS.setdefault(spec.name, spec) is not spec:
        raise UserError(f'there is a model family "{spec.name}" already; choose another name')


def model_names() -> list[str]:
    """All families."""
    return list(_SPECS)


def spec_of(name: str) -> ModelSpec:
    """The family ``name``. Raises UserError, with the nearest name, if there is none."""
    if name in _SPECS:
        return _SPECS[name]
    near = difflib.get_close_matches(name, _SPECS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_SPECS)}"
    more = "job.custom_import, or --custom-import MODULE, adds others"
    raise UserError(f'model.name: there is no model family "{name}"; {hint} ({more})')


def read_hf_config(settings: dict[str, Any]) -> tuple[ModelSpec, Any]:
    """The family and the dimensions that the content of a ``config.json`` describes.

    Raises ValueError, naming the field, for a family that there is not, and for what it does not implement.
    """
    known = [name for name, spec in _SPECS.items() if spec.from_hf]
    of_these = " or ".join(f'"{name}"' for name in known)
    if "model_type" not in settings:
        raise ValueError(f"there is no model_type; it must be {of_these}")
    spec = _SPECS.get(str(settings["model_type"]))
    if spec is None or spec.from_hf is None:
        raise ValueError(f'model_type is "{settings["model_type"]}"; it must be {of_these}')
    return spec, spec.from_hf(settings)


def model_config(section: Model) -> Any:
    """The dimensions that the [model] section describes: those of its flavor, with what it sets itself.

    Raises ValueError if they contradict each other.
    """
    spec = spec_of(section.name)
    fields = {field.name for field in dataclasses.fields(spec.config_class)}
    given = {name: value for name, value in section if name in fields and value is not None}
    return dataclasses.replace(spec.flavors[section.flavor], **given)
