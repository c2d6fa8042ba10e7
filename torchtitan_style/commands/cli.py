"""What all commands share: how configuration is named on the command line, help, and errors."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torchtitan_style.config.help import section_help
from torchtitan_style.config.load import DEFAULT_CONFIG
from torchtitan_style.errors import RunError, UserError

__all__ = ["ConfigArguments", "check_torch", "parse_config_arguments", "reported_errors"]

OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class ConfigArguments:
    """``--config FILE`` and the overrides beside it."""

    path: str
    overrides: list[str]


def parse_config_arguments(arguments: list[str], *, usage: str) -> ConfigArguments:
    """Take ``--config`` out of ``arguments``. ``--help [SECTION]`` prints help and exits."""
    path = os.path.relpath(DEFAULT_CONFIG)
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
    return ConfigArguments(path, overrides)


def check_torch() -> None:
    """Raise UserError if torch is missing or too old, without the seconds that importing it takes."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("torch is not installed here; ./run_train.sh sets everything up") from None
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UserError(f"torch {version} is too old: {oldest} or newer is needed; ./run_train.sh sets everything up")


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Print expected errors as a message and exit: with status 2 if a person can put it right, else 1.

    With several ranks all have the same error, and the first prints it.
    """
    try:
        yield
    except (UserError, RunError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    except KeyboardInterrupt:  # before training, which has a way of its own
        raise SystemExit(130) from None
    except BrokenPipeError:  # as in `... --help | head`
        sys.stderr.close()
        raise SystemExit(1) from None
