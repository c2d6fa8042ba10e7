"""What all commands share: how configuration is named on the command line, help, and errors."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import importlib.metadata
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torchtitan_style.checkpoint.saved import SavedModel, find_checkpoint, open_model
from torchtitan_style.config import Config
from torchtitan_style.config.help import section_help
from torchtitan_style.config.load import DEFAULT_CONFIG
from torchtitan_style.errors import RunError, UserError
from torchtitan_style.hub import fetch
from torchtitan_style.models.hf_folder import HFFolder
from torchtitan_style.signals import STOP_SIGNALS

__all__ = [
    "VERDICT",
    "Arguments",
    "ConfigArguments",
    "check_initial_weights",
    "check_torch",
    "check_verdict",
    "hf_folder",
    "parse_config_arguments",
    "reported_errors",
]

OLDEST_TORCH = (2, 11)

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)
"""What is wrong with a disk, and not with the program."""

VERDICT = "TORCHTITAN_STYLE_VERDICT"
"""Environment variable with the name of a file, in which a rank leaves the status that it has ended with after an
error that another attempt would not cure. Ranks that are started again after that end with it at once."""

_PATIENCE = 10
"""Seconds that the other ranks stay for the first to say what is wrong. Launchers end all once one has ended."""


@dataclass(frozen=True)
class ConfigArguments:
    """``--config FILE`` and the overrides beside it."""

    path: str
    overrides: list[str]
    chosen: str | None
    """What --config names; None if it was left out and ``path`` is the default."""


def parse_config_arguments(arguments: list[str], *, usage: str) -> ConfigArguments:
    """Take ``--config`` out of ``arguments``. ``--help [SECTION]`` prints help and exits."""
    path = None
    overrides = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in ("--help", "-h"):
            print(section_help(rest[0]) if rest and not rest[0].startswith("-") else usage)
            raise SystemExit(0)
        if argument == "--config":
            if not rest or rest[0].startswith("--"):
                raise UserError("--config needs a file, as in --config train_configs/qwen3.toml")
            path = rest.pop(0)
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
        else:
            overrides.append(argument)
    return ConfigArguments(os.path.relpath(DEFAULT_CONFIG) if path is None else path, overrides, path)


class Arguments(argparse.ArgumentParser):
    """A command's own options. A mistake in them is a UserError, and ``--help`` prints ``usage`` as it stands."""

    def __init__(self, usage: str) -> None:
        super().__init__(usage=usage, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows what the command takes")

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """All of ``arguments``; ``--help`` prints help and exits."""
        if {"--help", "-h"} & set(arguments):
            print(self.usage)
            raise SystemExit(0)
        self._check_names(arguments)
        return self.parse_args(arguments)

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
        """As ``parse``, with what is not the command's own beside it: overrides of the configuration."""
        if "--help" in arguments and (section := arguments[arguments.index("--help") + 1 :]):
            print(section_help(section[0]))
            raise SystemExit(0)
        if {"--help", "-h"} & set(arguments):
            self.parse(arguments)
        self._check_names(arguments)
        return self.parse_known_args(arguments)


def check_torch() -> None:
    """Raise UserError if torch is missing or too old, without the seconds that importing it takes."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("torch is not installed here; ./run_train.sh sets everything up") from None
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UserError(f"torch {version} is too old: {oldest} or newer is needed; ./run_train.sh sets everything up")


def hf_folder(source: str) -> HFFolder:
    """The model in Transformers' format that ``--hf`` names, its weights at hand and checked."""
    if isinstance(open_model(source, verify=False), SavedModel):
        raise UserError(
            f"--hf: {source} is a checkpoint, not a model in Transformers' format; export-hf makes one of it"
        )
    folder = HFFolder(fetch(source, weights=True))
    folder.check()
    return folder


def check_initial_weights(config: Config) -> None:
    """Raise UserError if the weights that a new run would start from are not there, damaged or another model's."""
    source = config.initial_weights
    if source and find_checkpoint(Path(config.job.dump_folder), verify=False) is None:
        found = open_model(source, verify=True)
        found.check(config.model.qwen3())


def check_verdict() -> None:
    """Exit if an earlier attempt of this launch has ended with an error that another one would not cure."""
    verdict = os.environ.get(VERDICT)
    if verdict and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.path.exists(verdict):
        raise SystemExit(int(Path(verdict).read_text(encoding="utf-8") or 1))


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Print expected errors as a message and exit: with status 2 if a person can put it right, else 1.

    With several ranks mostly all have the same error, and the first prints it, before any of them has ended.
    """
    try:
        yield
    except (UserError, RunError) as error:
        status = 2 if isinstance(error, UserError) else 1
        if verdict := os.environ.get(VERDICT):
            Path(verdict).write_text(str(status), encoding="utf-8")
        if os.environ.get("RANK", "0") != "0" and error.everywhere:
            _wait_for_the_end(status)  # and if none comes, this rank alone has the error
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(status) from None
    except KeyboardInterrupt:  # before training, which has a way of its own
        raise SystemExit(130) from None
    except BrokenPipeError:  # as in `... --help | head`
        sys.stderr.close()
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in _DISK:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _wait_for_the_end(status: int) -> None:
    """Exit with ``status`` when the launcher says that another rank has ended; return if it does not."""

    def end(_number: int, _frame: object) -> None:
        raise SystemExit(status)

    for number in STOP_SIGNALS:
        signal.signal(number, end)
    time.sleep(_PATIENCE)
