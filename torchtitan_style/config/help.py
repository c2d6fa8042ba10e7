"""``--help SECTION``: every key of a section with its default, from the schema's docstrings."""

from __future__ import annotations

import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel

from torchtitan_style.common.errors import UserError

from .names import nearest_section
from .schema import Config, sections_of

_TYPE_NAMES = {int: "whole number", float: "number", bool: "true | false", str: "string"}


class Key(NamedTuple):
    """What there is to know of one key."""

    name: str
    default: str
    """As in TOML; empty if it has none."""
    type: str
    text: str
    """What it means, on one line."""


def keys_of(section: type[BaseModel]) -> Iterator[Key]:
    """The keys of a section of the schema, in order."""
    for name, field in section.model_fields.items():
        default = "" if field.default is None or field.is_required() else _toml(field.default)
        yield Key(name, default, _type_name(field.annotation), " ".join((field.description or "").split()))


def section_help(name: str, schema: type[Config]) -> str:
    """All keys of section ``name`` (or the one key of ``section.key``). Raises UserError if there is none."""
    sections = sections_of(schema)
    section, wanted = name.removeprefix("--").strip("[]"), ""
    if section not in sections and "." in section:
        section, _, wanted = section.rpartition(".")
    if section not in sections:
        raise UserError(f"--help {name}: there is no such section{nearest_section(section, sections)}")
    model = sections[section]
    lines = [f"[{section}]  {model.__doc__}", ""]
    for key in keys_of(model):
        if wanted and wanted != key.name:
            continue
        if f"{section}.{key.name}" in sections:
            lines.append(f"[{section}.{key.name}]: a section of its own; --help {section}.{key.name}")
            continue
        default = f" = {key.default}" if key.default else ""
        lines.append(f"{section}.{key.name}{default}  ({key.type})")
        lines.append(textwrap.fill(key.text, 92, initial_indent="    ", subsequent_indent="    "))
    if len(lines) == 2:
        raise UserError(f"--help {name}: there is no such key; --help {section} lists them")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(f'"{a}"' for a in arguments)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(_type_name(a) for a in arguments if a is not type(None)) + ", optional"
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is list:
        kind = _type_name(arguments[0])
        return f"list of {kind}s" if kind in _TYPE_NAMES.values() else "list of tables"
    return _TYPE_NAMES.get(annotation, str(annotation))
