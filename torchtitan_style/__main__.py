"""The command line.

python -m torchtitan_style --help
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import textwrap
from typing import Any

from . import __version__
from .common.errors import UserError
from .common.program import begin, begin_command, begin_run, check_start, delivering_output, start_over_with
from .cpu.memory import TUNABLES


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

{commands}

  --help            this
  --help SECTION    every key of a section of the configuration, with its default
  COMMAND --help    what a command takes
  COMMAND --custom-import MODULE   import a module that registers a model family (docs/extending.md)
  --version         which version this is

Sections: {sections}

In a checkout, ./run_train.sh sets up the environment, then trains with one process per GPU.
"""

COMMANDS = {
    "train": ("[--config FILE] [--section.key VALUE ...]", "train in this process, on one device (NPROC=4: on four)"),
    "plan": ("[--config FILE] [--world-size N] [--search]", "what a run needs in memory and time, before it runs"),
    "prepare": ("[--config FILE] [--section.key VALUE ...]", "tokenize a corpus once, for all runs on it"),
    "generate": ("--checkpoint DIR --prompt TEXT", "write text that continues the prompt"),
    "chat": ("--checkpoint DIR", "talk to a model"),
    "eval": ("--checkpoint DIR --data FILE ...", "loss and bits per byte on text of your own, or tasks"),
    "report": ("RUN [RUN ...]", "how runs went, as one HTML file"),
    "checkpoint": ("list|verify|show DIR", "list the checkpoints of a run, and verify them"),
    "import-hf": ("--hf DIR_OR_REPO --output DIR", "a model in Transformers' format → a checkpoint"),
    "export-hf": ("--checkpoint DIR --output DIR", "a checkpoint → a model in Transformers' format"),
    "verify": (
        "[--hf DIR_OR_REPO] [--config FILE ...]",
        "compare a model with Transformers, or a layout with one process",
    ),
}
"""Each command: what it takes, and what it does."""

WRITERS = ("prepare", "import-hf", "export-hf")
"""Commands whose result is files: they go on when their output cannot be written."""


def usage() -> str:
    """What ``--help`` prints."""
    schema = _imported(".config.schema")
    commands = "\n".join(f"  {name + ' ' + takes:<49} {does}" for name, (takes, does) in COMMANDS.items())
    sections = ", ".join(schema.sections_of(schema.Config))
    return USAGE.format(commands=commands, sections=textwrap.fill(sections, 90, subsequent_indent=" " * 10))


def main(arguments: list[str]) -> None:
    if not arguments or arguments in (["--help"], ["-h"], ["help"]):
        print(usage())
        return
    if arguments == ["--version"]:
        print(f"torchtitan_style {__version__}")
        return
    with _imported(".common.reporting").reported_errors():
        check_start(arguments)
        if arguments[0] in ("--help", "-h", "help"):
            print(_imported(".launch.configure").help_of(arguments[1]))
            return
        name, *rest = arguments
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
            raise UserError(f'there is no command "{name}"; {hint}')
    # Imported here so that --help and --version are immediate: commands import torch.
    _imported(f".commands.{name.replace('-', '_')}").main(rest)


def console() -> None:
    """The ``torchtitan-style`` program that pip installs."""
    arguments = sys.argv[1:]
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may come next
        _imported(".commands.completion").complete_command(COMMANDS, run=main)
    if arguments[:1] == ["train"]:
        start_over_with(*TUNABLES)
        begin_run(arguments)
    else:
        begin_command()
        if arguments[:1] and arguments[0] in WRITERS and not {"--help", "-h"} & set(arguments):
            begin()
    with delivering_output():
        main(arguments)


if __name__ == "__main__":
    console()
