"""What all commands share: their options, help, and the model that ``--hf`` names."""

from __future__ import annotations

import argparse
import difflib
import os
from typing import NoReturn

from torchtitan_style.checkpoint.saved import SavedModel, open_model
from torchtitan_style.common.errors import UserError
from torchtitan_style.common.extensions import import_modules
from torchtitan_style.common.hub import fetch
from torchtitan_style.launch.configure import help_of
from torchtitan_style.models.hf_folder import HFFolder

from .completion import COMPLETING, add_keys, complete


class Arguments(argparse.ArgumentParser):
    """A command's own options. A mistake in them is a UserError, and ``--help`` prints ``usage`` as it stands."""

    def __init__(self, usage: str) -> None:
        super().__init__(usage=usage, add_help=False, allow_abbrev=False)
        self.add_argument("--custom-import", action="append", default=[], metavar="MODULE")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows what the command takes")

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """All of ``arguments``; ``--help`` prints help and exits."""
        if COMPLETING in os.environ:
            complete(self)
        if {"--help", "-h"} & set(arguments):
            print(self.usage)
            raise SystemExit(0)
        self._check_names(arguments)
        options = self.parse_args(arguments)
        import_modules(options.custom_import, key="--custom-import")
        return options

    def _check_names(self, arguments: list[str]) -> None:
        """Argparse says of a misspelled option that the right one is missing; this says which was meant."""
        for before, argument in zip(["", *arguments], arguments, strict=False):
            name = argument.partition("=")[0]
            if name.startswith("--") and "." not in name and name not in self._option_string_actions:
                option = self._option_string_actions.get(before)
                if near := difflib.get_close_matches(name, self._option_string_actions, n=1, cutoff=0.7):
                    hint = f"did you mean {near[0]}?"
                elif option is not None and option.nargs is None:
                    hint = f"if it is the value of {before}, write {before}={argument}"
                else:
                    hint = "--help shows what the command takes"
                raise UserError(f"there is no option {name}; {hint}")

    def parse_known(self, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """As ``parse``; also returns the arguments that are not the command's own: overrides of the configuration."""
        if COMPLETING in os.environ:
            add_keys(self)
            complete(self)
        if "--help" in arguments and (section := arguments[arguments.index("--help") + 1 :]):
            print(help_of(section[0]))
            raise SystemExit(0)
        if {"--help", "-h"} & set(arguments):
            self.parse(arguments)
        self._check_names(arguments)
        options, rest = self.parse_known_args(arguments)
        import_modules(options.custom_import, key="--custom-import")
        return options, rest


def hf_folder(source: str) -> HFFolder:
    """The model in Transformers' format that ``--hf`` names, downloaded if needed, and checked."""
    if isinstance(open_model(source, verify=False), SavedModel):
        raise UserError(
            f"--hf: {source} is a checkpoint, not a model in Transformers' format; export-hf makes one of it"
        )
    folder = HFFolder(fetch(source, weights=True))
    folder.check()
    return folder
