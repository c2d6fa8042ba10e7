"""The command line.

python -m torchtitan_style --help
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import Any

from . import __version__
from .errors import UserError


def _imported(module: str) -> Any:
    """A module of the package. Exits with a message if it needs a package that is not installed."""
    try:
        return importlib.import_module(module, __package__)
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed in {sys.executable}; ./run_train.sh --setup-only sets everything up "
            "and prints the Python to use (as .venv/bin/python)",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


USAGE = """\
usage: python -m torchtitan_style COMMAND [...]

  train [--config FILE] [--section.key VALUE ...]   train, with one process per GPU (NPROC=4 for another number)
  prepare [--config FILE] [--section.key VALUE ...] tokenize a corpus once, for all runs on it
  generate --checkpoint DIR --prompt TEXT           text that goes on from the prompt
  chat --checkpoint DIR                             talk to a model
  checkpoint list|verify|show DIR                   the checkpoints of a run, and whether they are whole
  import-hf --hf DIR_OR_REPO --output DIR           a model in Transformers' format → a checkpoint
  export-hf --checkpoint DIR --output DIR           a checkpoint → a model in Transformers' format
  verify --hf DIR_OR_REPO                           is it what Transformers computes?
  verify --config FILE [--section.key VALUE ...]    does this layout compute what one process computes?

  --help            this
  --help SECTION    every key of a section of the configuration, with its default
  COMMAND --help    what a command takes
  --version         which version this is

Sections: job, model, data, training, optimizer, optimizer.muon, lr_scheduler, parallelism,
          activation_checkpoint, compile, checkpoint, validation, metrics, profiling, comm, generation, debug

In a checkout, ./run_train.sh is the same as train, and sets up the environment first.
"""

COMMANDS = ("train", "prepare", "generate", "chat", "checkpoint", "import-hf", "export-hf", "verify")


def main(arguments: list[str]) -> None:
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed, as by >&-
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
    if not arguments or arguments in (["--help"], ["-h"], ["help"]):
        print(USAGE)  # at once: what checks a configuration takes longer to import than Python to start
        return
    if arguments == ["--version"]:
        print(f"torchtitan_style {__version__}")
        return
    with _imported(".commands.cli").reported_errors():
        if arguments[0] in ("--help", "-h", "help"):
            print(_imported(".config.help").section_help(arguments[1]))
            return
        name, *rest = arguments
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
            raise UserError(f'there is no command "{name}"; {hint}')
    # Only now: each imports what it needs, and help is to be there at once.
    if name == "train" and "RANK" not in os.environ:  # else torchrun has started this process as one of several
        _imported(".launch").main(rest, program="python -m torchtitan_style train")
        return
    _imported(f".commands.{name.replace('-', '_')}").main(rest)


def console() -> None:
    """The ``torchtitan-style`` program that pip installs."""
    main(sys.argv[1:])


if __name__ == "__main__":
    console()
