"""From a TOML file and command-line overrides to a checked ``Config``.

Everything that is wrong is collected and reported in one ``UserError``. Nothing here imports
torch, so a typo costs no waiting.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from torchtitan_style.checkpoint.saved import SavedModel, find_checkpoint, open_model
from torchtitan_style.errors import UserError

from .checks import Problem, cross_checks
from .files import DEFAULT_CONFIG, find_config, read_toml
from .names import all_keys, did_you_mean, nearest_section
from .schema import SECTIONS, Config, Job

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["DEFAULT_CONFIG", "load_config", "read_settings", "to_toml"]


def load_config(path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = 1) -> Config:
    """Read ``path``, apply ``overrides`` (as on the command line), check it all.

    path: of a file, or the name of a shipped configuration, as "qwen3_8b".
    world_size: number of processes; None: not known yet, so the degrees are not held against it.

    Raises UserError with every problem found: syntax, unknown keys, wrong types, impossible values
    and combinations.
    """
    path = find_config(path)
    tree = read_toml(path)
    from_command_line, problems = _parse_overrides(overrides)
    arguments = {*from_command_line, *(problem.keys[0] for problem in problems)}
    _apply(from_command_line, tree)
    problems += _take_over(tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        details = error.errors()
        problems += [_explain(detail) for detail in details]
        # What is right is still checked against itself, with defaults for what is not.
        for detail in details:
            _remove(tree, detail["loc"])
        config = Config.model_validate(tree)
    wrong = {key for problem in problems for key in problem.keys}
    for problem in cross_checks(config, world_size):
        if not any(key in wrong or key.partition(".")[0] in wrong for key in problem.keys):
            problems.append(problem)
    if problems:
        raise UserError(_report(problems, path, arguments))
    return _resolve(config)


def read_settings(path: str | Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """What ``path`` and ``overrides`` set themselves, by section: no defaults, nothing that comes with weights.

    path: None for the overrides alone. Raises UserError if the file cannot be read.
    """
    tree = {} if path is None else read_toml(find_config(path))
    _apply(_parse_overrides(overrides)[0], tree)
    return tree


def _apply(overrides: dict[str, Any], tree: dict[str, Any]) -> None:
    """Put ``overrides``, by "section.key", into ``tree``."""
    for key, value in overrides.items():
        *path_to, name = key.split(".")
        section: Any = tree
        for part in path_to:
            section = section.setdefault(part, {}) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[name] = value


def _resolve(config: Config) -> Config:
    """``config`` with the warm-up written out, so that the config.toml of a run shows it."""
    schedule = config.lr_scheduler
    warmup = schedule.warmup(config.training.steps)
    return config.model_copy(update={"lr_scheduler": schedule.model_copy(update={"warmup_steps": warmup})})


def to_toml(config: Config, *, dimensions: bool = False) -> str:
    """The resolved configuration, every setting included, as TOML that ``load_config`` reads.

    dimensions: with those of the model that its flavor decides written out.
    """
    tree = config.model_dump(exclude_none=True)
    if dimensions:
        tree["model"] |= dataclasses.asdict(config.model.qwen3())
    return tomli_w.dumps(tree)


def _take_over(tree: dict[str, Any]) -> list[Problem]:
    """Fill in what comes with the weights that a run starts from: dimensions and tokenizer.

    What the user has set stays, but that a tokenizer be trained: the weights know theirs only. A run
    that has checkpoints goes on from those, and needs what it started from no more.
    """
    sections = {name: tree.get(name, {}) for name in ("model", "checkpoint", "data", "job")}
    if not all(isinstance(section, dict) for section in sections.values()):
        return []
    for section, name in (("model", "hf_assets_path"), ("checkpoint", "initial_load_path")):
        source = sections[section].get(name)
        if not isinstance(source, str) or not source:
            continue
        try:
            own = _own_checkpoint(sections["job"])
            found = own or open_model(source, verify=False)
        except UserError as error:
            return [Problem((f"{section}.{name}",), str(error))]
        tree["model"] = dataclasses.asdict(found.config) | sections["model"]
        has_trained_one = own is not None and _settings_of(own).get("data", {}).get("tokenizer") == "train"
        if found.tokenizer and not has_trained_one and sections["data"].get("tokenizer", "train") == "train":
            tree["data"] = sections["data"] | {"tokenizer": source}
        break
    return []


def _own_checkpoint(job: dict[str, Any]) -> SavedModel | None:
    """A checkpoint of the run itself, if there is one that says what model it is."""
    folder = job.get("dump_folder", Job().dump_folder)
    try:
        path = find_checkpoint(Path(os.path.expanduser(folder)), verify=False)
        return SavedModel(path) if path else None
    except (UserError, TypeError):
        return None


def _settings_of(checkpoint: SavedModel) -> dict[str, Any]:
    """What the run that has written ``checkpoint`` was told, if that can be read."""
    try:
        return tomllib.loads((checkpoint.path / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _parse_overrides(arguments: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """``--section.key VALUE``, ``--section.key=VALUE`` and, for switches, ``--section.key``."""
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        section, dot, name = key.rpartition(".")
        if not argument.startswith("--") or not (section and dot and name):
            problems.append(Problem((f"argument {argument}",), "expected --section.key VALUE" + did_you_mean(key)))
            if rest and not rest[0].startswith("--"):
                rest.pop(0)
            continue
        annotation = _annotation(section, name)
        given = [text] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            given.append(rest.pop(0))
            if not _accepts(annotation, list):
                break
        if section not in SECTIONS:
            problems.append(Problem((key,), f"unknown section{nearest_section(section)}"))
        elif annotation is None:
            problems.append(Problem((key,), f"unknown key{did_you_mean(key)}"))
        elif not given and _accepts(annotation, bool):
            values[key] = True
        elif not given:
            problems.append(Problem((key,), "needs a value"))
        else:
            values[key] = _parse_value(given, annotation)
    return values, problems


def _parse_value(given: list[str], annotation: Any) -> Any:
    """Command-line text to a TOML value of the type that the field wants, where it is one."""
    text = given[0]
    if _accepts(annotation, list) and not (len(given) == 1 and text.startswith("[")):
        return given
    if _accepts(annotation, str):
        return text
    if text in ("True", "False"):
        text = text.lower()
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:  # no TOML, or a number of thousands of digits
        pass
    if _accepts(annotation, list):
        return given  # one text that begins like a list, as the pattern [ab]*.txt
    try:
        return float(text)  # Python writes 1e-3 and TOML too, but only Python writes 1.e-3 or .1
    except ValueError:
        return text


def _annotation(section: str, name: str) -> Any:
    """The type of a key, or None if there is no such key."""
    key = f"{section}.{name}"
    return SECTIONS[section].model_fields[name].annotation if key in all_keys() else None


def _accepts(annotation: Any, kind: type) -> bool:
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(_accepts(option, kind) for option in typing.get_args(annotation))
    if origin is typing.Literal:
        return any(type(option) is kind for option in typing.get_args(annotation))
    return (origin or annotation) is kind


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


def _explain(detail: ErrorDetails) -> Problem:
    """A pydantic error in words for the user."""
    location = [str(part) for part in detail["loc"]]
    depth = max((n for n in range(1, len(location)) if ".".join(location[:n]) in SECTIONS), default=0)
    section, key = ".".join(location[:depth]), ".".join(location[: depth + 1])
    rest = location[depth + 1 :]
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    shown = f"{value!r}" if not isinstance(value, str) else f'"{value}"'
    bounds = {
        "greater_than_equal": "at least {ge}",
        "greater_than": "greater than {gt}",
        "less_than_equal": "at most {le}",
        "less_than": "less than {lt}",
        "finite_number": "finite",
    }
    if len(rest) == 2 and rest[0].isdecimal():  # a key of an entry of a list of sections, as data.mixture
        name = rest[1]
        options = [*typing.get_args(_annotation(section, location[depth]))[0].model_fields]
        near = difflib.get_close_matches(name, options, n=1)
        text = {
            "extra_forbidden": f"unknown key {name}" + (f"; did you mean {near[0]}?" if near else ""),
            "missing": f"{name} is missing",
            "string_pattern_mismatch": f"{name} must be letters, digits, _, . and - only, not {shown}",
        }.get(kind, f"{name}: {detail['msg']}, not {shown}")
        if kind in bounds:
            text = f"{name} must be {bounds[kind].format(**context)}, not {shown}"
        return Problem((key,), f"entry {int(rest[0]) + 1}: {text}")
    if kind == "extra_forbidden":
        what = "key" if section else "section"
        return Problem((key,), f"unknown {what}{did_you_mean(key)}")
    if kind in _TYPES:
        entry = f", entry {int(rest[0]) + 1}" if rest and rest[0].isdecimal() else ""
        return Problem((key,), f"must be {_TYPES[kind]}{entry}, not {shown}")
    if kind == "literal_error":
        options = [str(o) for o in typing.get_args(_annotation(section, location[depth]))]
        close = difflib.get_close_matches(str(value), options, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return Problem((key,), f"must be one of {', '.join(options)}, not {shown}{hint}")
    if kind in bounds:
        return Problem((key,), f"must be {bounds[kind].format(**context)}, not {shown}")
    if kind == "string_too_short":
        return Problem((key,), "must not be empty")
    return Problem((key,), f"{detail['msg']}, not {shown}")


def _remove(tree: dict[str, Any], location: tuple[int | str, ...]) -> None:
    """Take the key that an error points at out of ``tree``."""
    for part in map(str, location):
        if not isinstance(tree.get(part), dict) or part == location[-1]:
            tree.pop(part, None)
            return
        tree = tree[part]


def _report(problems: list[Problem], path: str | Path, from_command_line: set[str]) -> str:
    lines = []
    for problem in problems:
        culprit = problem.keys[0]
        if culprit.startswith("argument "):
            where = culprit
        elif culprit in from_command_line:
            where = f"--{culprit}"
        else:
            named = [key for key in problem.keys if key in from_command_line]
            where = f"{path}: {culprit}" + (f" (with --{named[0]})" if named else "")
        lines.append(f"{where}: {problem.text}")
    if len(lines) == 1:
        return lines[0]
    return f"{len(lines)} problems in the configuration\n" + "\n".join(f"  {line}" for line in lines)
