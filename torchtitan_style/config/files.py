"""Finding and reading a configuration file."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

from torchtitan_style.common.errors import UserError, cut
from torchtitan_style.common.reading import parse_toml, read_toml_text

_PLACES = (
    Path(__file__).parents[1] / "train_configs",  # in a wheel: setup.py copies them into the package
    Path(__file__).parents[2] / "train_configs",  # in a checkout
)
CONFIG_FOLDER = next((place for place in _PLACES if (place / "qwen3.toml").is_file()), _PLACES[1])
"""The configurations that come with the program."""

DEFAULT_CONFIG = CONFIG_FOLDER / "qwen3.toml"
"""The configuration used when none is named."""


def find_config(named: str | Path) -> Path:
    """The file that ``--config`` names: a path, or a shipped configuration by name, as "qwen3_8b".

    A path that exists comes first. A path that does not exist is returned as it is.
    """
    path = Path(named)
    if path.parent != Path() or os.path.exists(path):  # a name that is too long does not exist
        return path
    with_suffix = path if path.suffix == ".toml" else path.with_name(f"{path.name}.toml")
    for candidate in (with_suffix, CONFIG_FOLDER / with_suffix):
        if os.path.isfile(candidate):
            return candidate
    return path


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises UserError, naming the line, if it is missing or not valid."""
    try:
        text = read_toml_text(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such config file{_nearest_file(path)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: cannot be read: it is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return parse_toml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid TOML: {_explain(str(error), text)}") from None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level: {"optimizer": {"lr": 0.1}} becomes {"optimizer.lr": 0.1}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _nearest_file(path: Path) -> str:
    names = [
        str(p)
        for p in sorted({*path.parent.glob("*.toml"), *CONFIG_FOLDER.glob("*.toml")})
        if p.name != "pyproject.toml"
    ]
    close = difflib.get_close_matches(str(path), names, n=1)
    if not close:
        by_name = {Path(name).name: name for name in names}
        wanted = path.name if path.suffix == ".toml" else f"{path.name}.toml"
        close = [by_name[name] for name in difflib.get_close_matches(wanted, by_name, n=1)]
    if not close:
        return ""
    near = Path(close[0])
    is_named = path.parent == Path() and near.parent == CONFIG_FOLDER  # as --config qwen3_8b
    return f"; did you mean {near.stem if is_named else near}?"


def _explain(message: str, text: str) -> str:
    """A message of tomllib's in words for the user, with the number and the text of the line."""
    place = re.search(r"\(at line (\d+), column (\d+)\)$", message)
    if place is None:
        at_end = message.endswith("(at end of document)")
        return f"{message[: message.rindex(' (')]}, at the end of the file" if at_end else message
    number, problem = int(place[1]), message[: place.start()].strip()
    line = cut(text.split("\n")[number - 1].strip(), 200)
    if re.match(r"Cannot (declare|mutate|overwrite|redefine)", problem):
        header = re.match(r"\[+\s*([^\]]*?)\s*\]", line)
        if header:
            problem = f"[{header[1]}] is defined twice; put its keys into one section"
        else:
            problem = f"{line.partition('=')[0].strip()} is defined twice"
    elif problem.startswith(("Invalid value", "Invalid initial character")) and "=" in line:
        key = line.partition("=")[0].strip()
        problem = f"{key} has no valid value (text needs quotes; true and false are lowercase)"
    return f'line {number}, column {place[2]}: {problem}, in "{line}"'
