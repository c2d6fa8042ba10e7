"""From a TOML file and command-line overrides to a ``Config``, with everything that is wrong in one message.

``launch/configure.py`` is where a configuration is put together: what model families and weights add is not known
here. Nothing here imports torch, so a typo costs no waiting.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from torchtitan_style.common.errors import UserError, shown
from torchtitan_style.common.reading import check_text, parse_toml

from .checks import Problem
from .files import find_config, read_toml
from .names import Sections, did_you_mean, nearest_section
from .schema import Config, sections_of

_EXPLAINED = 20
"""Problems that are looked into and shown; of the others only the number is."""


class Draft:
    """A configuration while it is put together: the settings as they are written, and what is wrong so far."""

    def __init__(self, path: str | Path, overrides: Sequence[str] = ()) -> None:
        """Read ``path``, a file or the name of a shipped configuration. Raises UserError if it cannot be read."""
        self.path = find_config(path)
        self.tree = read_toml(self.path)
        self.problems: list[Problem] = []
        self._further: list[str] = []
        """Keys with problems that are only counted."""
        self._overrides = list(overrides)
        self._arguments: set[str] = set()
        """The keys that the command line names."""

    def peek(self, section: str, key: str) -> Any:
        """What a key is set to, by the command line or the file, before anything is checked; None if it is not."""
        values, _ = _parse_overrides(self._overrides, sections_of(Config))
        found = self.tree.get(section)
        return values.get(f"{section}.{key}", found.get(key) if isinstance(found, dict) else None)

    def peek_list(self, section: str, key: str) -> list[str]:
        """The same for a key that is a list of strings; of another type, nothing."""
        found = self.peek(section, key)
        return [item for item in found if isinstance(item, str)] if isinstance(found, list) else []

    def apply_overrides(self, schema: type[Config]) -> None:
        """Put what the command line says in the place of what the file says."""
        values, problems = _parse_overrides(self._overrides, sections_of(schema))
        self._arguments = {*values, *(problem.keys[0] for problem in problems)}
        self.problems += problems
        optimizer = self.tree.get("optimizer")
        if values.get("optimizer.name", "muon") != "muon" and isinstance(optimizer, dict):
            optimizer.pop("muon", None)  # the file's settings of the optimizer that the command line replaces
        _apply(values, self.tree)

    def checked(self, schema: type[Config]) -> Config:
        """The settings, with defaults in the place of those that are wrong by themselves, which are noted."""
        try:
            return schema.model_validate(self.tree)
        except ValidationError as error:
            details, sections = error.errors(include_url=False), sections_of(schema)
            self.problems += [_explain(detail, sections) for detail in details[:_EXPLAINED]]
            self._further += [".".join(map(str, detail["loc"][:2])) for detail in details[_EXPLAINED:]]
            for detail in details:
                _remove(self.tree, detail["loc"])
            return schema.model_validate(self.tree)

    def add(self, problems: Iterable[Problem]) -> None:
        """Note ``problems`` between settings, but for those whose settings are wrong by themselves."""
        wrong = {key for problem in self.problems for key in problem.keys} | set(self._further)
        for problem in problems:
            if not any(key in wrong or key.partition(".")[0] in wrong for key in problem.keys):
                self.problems.append(problem)

    def raise_problems(self) -> None:
        """Raise UserError with everything that is wrong, if anything is."""
        if self.problems:
            raise UserError(_report(self.problems, self.path, self._arguments, further=len(self._further)))


def read_settings(path: str | Path | None, overrides: Sequence[str], schema: type[Config]) -> dict[str, Any]:
    """What ``path`` and ``overrides`` set themselves, by section: no defaults, nothing that comes with weights.

    path: None for the overrides alone. Raises UserError if the file cannot be read.
    """
    tree = {} if path is None else read_toml(find_config(path))
    _apply(_parse_overrides(overrides, sections_of(schema))[0], tree)
    return tree


def _apply(overrides: Mapping[str, Any], tree: dict[str, Any]) -> None:
    """Put ``overrides``, by "section.key", into ``tree``."""
    for key, value in overrides.items():
        *path_to, name = key.split(".")
        section: Any = tree
        for part in path_to:
            section = section.setdefault(part, {}) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[name] = value


def to_toml(config: Config, *, dimensions: Mapping[str, Any] | None = None) -> str:
    """The resolved configuration, every setting included, as TOML that can be given as ``--config``.

    dimensions: of the model, to be written out although its flavor decides them.
    """
    tree = config.model_dump(exclude_none=True)
    tree["model"] |= dimensions or {}
    return tomli_w.dumps(tree)


def _parse_overrides(arguments: Sequence[str], sections: Sections) -> tuple[dict[str, Any], list[Problem]]:
    """``--section.key VALUE``, ``--section.key=VALUE`` and, for switches, ``--section.key``."""
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    rest = list(arguments)

    def hint(find: Callable[[str, Sections], str], name: str) -> str:
        return find(name, sections) if len(problems) < _EXPLAINED else ""  # it takes a millisecond

    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        section, dot, name = key.rpartition(".")
        if not argument.startswith("--") or not (section and dot and name):
            problems.append(
                Problem((f"argument {argument}",), "expected --section.key VALUE" + hint(did_you_mean, key))
            )
            if rest and not rest[0].startswith("--"):
                rest.pop(0)
            continue
        annotation = _annotation(section, name, sections)
        given = [text] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            given.append(rest.pop(0))
            if not accepts(annotation, list):
                break
        if section not in sections:
            problems.append(Problem((key,), f"unknown section{hint(nearest_section, section)}"))
        elif annotation is None:
            problems.append(Problem((key,), f"unknown key{hint(did_you_mean, key)}"))
        elif text_problem := _text_problem(given):
            problems.append(Problem((key,), text_problem))
        elif not given and accepts(annotation, bool):
            values[key] = True
        elif not given:
            problems.append(Problem((key,), "needs a value"))
        else:
            values[key] = _parse_value(given, annotation)
    return values, problems


def _parse_value(given: list[str], annotation: Any) -> Any:
    """Command-line text to a TOML value of the type that the field wants, where it is one."""
    text = given[0]
    if accepts(annotation, list) and not (len(given) == 1 and text.startswith("[")):
        return [int(entry) if entry.isdecimal() else entry for entry in given] if _has_numbers(annotation) else given
    if accepts(annotation, str):
        return text
    if text in ("True", "False"):
        text = text.lower()
    try:
        value = parse_toml(f"value = {text}")["value"]
        if len(parse_toml(f"value = [{text}, 0]")["value"]) == 2:  # and it is one value, with no more lines behind it
            return value
    except ValueError:  # no TOML, or a number of thousands of digits
        pass
    if accepts(annotation, list):
        return given  # one text that begins like a list, as the pattern [ab]*.txt
    try:
        return float(text)  # Python writes 1e-3 and TOML too, but only Python writes 1.e-3 or .1
    except ValueError:
        return text


def _text_problem(given: list[str]) -> str | None:
    try:
        for text in given:
            check_text(text)
    except ValueError as error:
        return str(error)
    return None


def _annotation(section: str, name: str, sections: Sections) -> Any:
    """The type of a key, or None if there is no such key."""
    if section not in sections or f"{section}.{name}" in sections:
        return None
    field = sections[section].model_fields.get(name)
    return field.annotation if field else None


def accepts(annotation: Any, kind: type) -> bool:
    """Whether a key of this type may have a value of ``kind``."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(accepts(option, kind) for option in typing.get_args(annotation))
    if origin is typing.Literal:
        return any(type(option) is kind for option in typing.get_args(annotation))
    return (origin or annotation) is kind


def options_of(annotation: Any) -> list[str]:
    """The values of a key that takes one of several; of another key, none."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return [option for part in typing.get_args(annotation) for option in options_of(part)]
    return [str(option) for option in typing.get_args(annotation)] if origin is typing.Literal else []


def _has_numbers(annotation: Any) -> bool:
    """Whether it is, or may be, a list of whole numbers."""
    return list[int] in (annotation, *typing.get_args(annotation))


_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "model_type": "a section of keys",
    "dict_type": "a section of keys",
}


def _explain(detail: ErrorDetails, sections: Sections) -> Problem:
    """A pydantic error in words for the user."""
    location = [str(part) for part in detail["loc"]]
    depth = max((n for n in range(1, len(location)) if ".".join(location[:n]) in sections), default=0)
    section, key = ".".join(location[:depth]), ".".join(location[: depth + 1])
    rest = location[depth + 1 :]
    kind, context, given = detail["type"], detail.get("ctx", {}), shown(detail["input"])
    bounds = {
        "greater_than_equal": "at least {ge}",
        "greater_than": "greater than {gt}",
        "less_than_equal": "at most {le}",
        "less_than": "less than {lt}",
        "finite_number": "finite",
    }
    if len(rest) == 2 and rest[0].isdecimal():  # a key of an entry of a list of sections, as data.mixture
        name = rest[1]
        options = [*typing.get_args(_annotation(section, location[depth], sections))[0].model_fields]
        near = difflib.get_close_matches(name, options, n=1)
        text = {
            "extra_forbidden": f"unknown key {name}" + (f"; did you mean {near[0]}?" if near else ""),
            "missing": f"{name} is missing",
            "string_pattern_mismatch": f"{name} must be letters, digits, _, . and - only, not {given}",
        }.get(kind, f"{name}: {detail['msg']}, not {given}")
        if kind in bounds:
            text = f"{name} must be {bounds[kind].format(**context)}, not {given}"
        return Problem((key,), f"entry {int(rest[0]) + 1}: {text}")
    if kind == "extra_forbidden":
        what = "key" if section else "section"
        return Problem((key,), f"unknown {what}{did_you_mean(key, sections)}")
    if kind in _TYPES:
        entry = f", entry {int(rest[0]) + 1}" if rest and rest[0].isdecimal() else ""
        return Problem((key,), f"must be {_TYPES[kind]}{entry}, not {given}")
    if kind == "literal_error":
        options = options_of(_annotation(section, location[depth], sections))
        close = difflib.get_close_matches(given.strip('"'), options, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return Problem((key,), f"must be one of {', '.join(options)}, not {given}{hint}")
    if kind in bounds:
        return Problem((key,), f"must be {bounds[kind].format(**context)}, not {given}")
    if kind == "string_too_short":
        return Problem((key,), "must not be empty")
    return Problem((key,), f"{detail['msg']}, not {given}")


def _remove(tree: dict[str, Any], location: tuple[int | str, ...]) -> None:
    """Take the key that an error points at out of ``tree``."""
    for part in map(str, location):
        if not isinstance(tree.get(part), dict) or part == location[-1]:
            tree.pop(part, None)
            return
        tree = tree[part]


def _report(problems: list[Problem], path: str | Path, from_command_line: set[str], *, further: int = 0) -> str:
    """further: problems that are not among ``problems``."""
    lines: list[str] = []
    for problem in problems[:_EXPLAINED]:
        culprit = problem.keys[0]
        if culprit.startswith("argument "):
            where = culprit
        elif culprit in from_command_line:
            where = f"--{culprit}"
        else:
            named = [key for key in problem.keys if key in from_command_line]
            where = f"{path}: {culprit}" + (f" (with --{named[0]})" if named else "")
        lines.append(f"{where}: {problem.text}")
    count = len(problems) + further
    if count == 1:
        return lines[0]
    more = [f"… and {count - len(lines):,} more"] if count > len(lines) else []
    return f"{count:,} problems in the configuration\n" + "\n".join(f"  {line}" for line in [*lines, *more])
