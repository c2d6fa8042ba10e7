"""The [model] section of each family: its dimensions, beside what all families have."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from typing import Any, Literal, cast

from pydantic import Field, create_model

from torchtitan_style.config.schema import Config, Model

from .registry import model_names
from .spec import ModelSpec


def schema_of(spec: ModelSpec) -> type[Config]:
    """The schema of a configuration whose model is of this family."""
    known = spec.name, id(spec), *model_names()
    if known not in _schemas:
        _schemas[known] = _make_schema(spec)
    return _schemas[known]


_schemas: dict[tuple[Any, ...], type[Config]] = {}


def _make_schema(spec: ModelSpec) -> type[Config]:
    section: Any = create_model(
        "Model",
        __base__=Model,
        __doc__=Model.__doc__,
        name=_choice(Model, "name", model_names(), spec.name),
        flavor=_choice(Model, "flavor", [*spec.flavors], "small"),
        **_dimensions(spec.config_class),
    )
    schema: Any = create_model("Config", __base__=Config, __doc__=Config.__doc__, model=(section, section()))
    return cast(type[Config], schema)


def _choice(section: type[Model], key: str, options: list[str], default: str) -> Any:
    """A key that takes one of ``options``."""
    return Literal[tuple(options)], Field(default, description=section.model_fields[key].description)


def _dimensions(config_class: type) -> dict[str, Any]:
    """One optional field per field of ``config_class``, with its type and docstring."""
    types: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str, "tuple[int, ...]": list[int]}
    docs = _attribute_docstrings(config_class)
    return {
        f.name: (types[str(f.type)] | None, Field(None, description=docs[f.name]))
        for f in dataclasses.fields(config_class)
    }


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """The string that follows each annotated attribute in the source of ``cls`` and of what it inherits from."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__[:-1]):
        definition = cast(ast.ClassDef, ast.parse(inspect.cleandoc(inspect.getsource(each))).body[0])
        found |= {
            ast.unparse(field.target): inspect.cleandoc(ast.literal_eval(text.value))
            for field, text in itertools.pairwise(definition.body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        }
    return found
