"""Completion in the shell, by argcomplete: commands, their options, keys of the configuration, and their values.

eval "$(register-python-argcomplete torchtitan-style)"
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from pydantic.fields import FieldInfo

from torchtitan_style.config.files import CONFIG_FOLDER
from torchtitan_style.config.load import accepts, options_of
from torchtitan_style.config.schema import sections_of
from torchtitan_style.models.registry import model_names, spec_of
from torchtitan_style.models.section import schema_of

COMPLETING = "_ARGCOMPLETE"
"""Set by the shell when it asks what may come next: how many words come before the arguments."""


def complete_command(commands: Mapping[str, tuple[str, str]], *, run: Callable[[list[str]], None]) -> None:
    """Offer ``commands``; behind one of them, ``run`` it, and it offers what it takes."""
    before = int(os.environ[COMPLETING])
    words = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split(" ")
    if len(words) > before + 1 and words[before] in commands:
        os.environ[COMPLETING] = str(before + 1)
        run([words[before]])
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", action="store_true")
    subparsers = parser.add_subparsers()
    for name, (_, does) in commands.items():
        subparsers.add_parser(name, help=does)
    complete(parser)


def complete(parser: argparse.ArgumentParser) -> NoReturn:
    """Write what may come next to where the shell reads it, and exit."""
    import argcomplete

    argcomplete.autocomplete(parser)
    raise SystemExit(1)


def add_keys(parser: argparse.ArgumentParser) -> None:
    """Add the keys of all model families to ``parser``, and the names of shipped configurations to its --config."""
    import argcomplete

    config: Any = parser._option_string_actions["--config"]
    names, files = [path.stem for path in CONFIG_FOLDER.glob("*.toml")], argcomplete.FilesCompleter(["toml"])
    config.completer = lambda prefix, **_: [*names, *files(prefix)]
    for family in model_names():
        sections = sections_of(schema_of(spec_of(family)))
        for section, model in sections.items():
            for name, field in model.model_fields.items():
                if f"{section}.{name}" not in sections:
                    _add_key(parser, f"--{section}.{name}", field)


def _add_key(parser: argparse.ArgumentParser, option: str, field: FieldInfo) -> None:
    values = ["true", "false"] if accepts(field.annotation, bool) else options_of(field.annotation)
    if known := parser._option_string_actions.get(option):  # of another family
        known.choices = [*dict.fromkeys([*(known.choices or ()), *values])] or None
        return
    nargs = "*" if accepts(field.annotation, list) else None
    text = " ".join((field.description or "").split()).replace("%", "%%")
    parser.add_argument(option, choices=values or None, nargs=nargs, help=text)
