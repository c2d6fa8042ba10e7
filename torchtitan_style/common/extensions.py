"""What can be added without editing the package: losses, optimizers, schedules and data sources, by name.

Model families have a registry of their own (``models/registry.py``). A module that registers something is named in
``job.custom_import``. See docs/extending.md.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import UserError

__all__ = [
    "LOSSES",
    "OPTIMIZERS",
    "SCHEDULES",
    "SOURCES",
    "Registry",
    "Source",
    "import_modules",
    "register_loss",
    "register_optimizer",
    "register_schedule",
    "register_source",
]

T = TypeVar("T")

_IMPORTED = "TORCHTITAN_STYLE_CUSTOM_IMPORT"
"""Environment variable with the modules that were imported, for the processes that this one starts."""


class Registry(Generic[T]):
    """Things of one kind by name. key: the setting that names one. built_in: names that are there without one."""

    def __init__(self, key: str, *, built_in: Iterable[str] = ()) -> None:
        self.key, self._built_in = key, tuple(built_in)
        self._added: dict[str, T] = {}

    def register(self, name: str, thing: T) -> None:
        """Make ``thing`` known as ``name``. Raises UserError if the name is taken."""
        if name in self._built_in or self._added.get(name, thing) is not thing:
            raise UserError(f'{self.key}: there is a "{name}" already; register it under another name')
        self._added[name] = thing

    def get(self, name: str) -> T:
        """What was registered as ``name``."""
        self._import_for(name)
        return self._added[name]

    def added(self, name: str) -> bool:
        """Whether ``name`` was registered, and is not built in."""
        self._import_for(name)
        return name in self._added

    def names(self) -> list[str]:
        """All names, the built-in ones first."""
        return [*self._built_in, *self._added]

    def _import_for(self, name: str) -> None:
        """In a process that was started by the one that imported the modules, import them when they are needed."""
        if name not in self._built_in and name not in self._added and (modules := os.environ.get(_IMPORTED)):
            import_modules(modules.split(","))

    def problem(self, name: str) -> str | None:
        """What is wrong with ``name`` as a value of the setting, or None."""
        names = self.names()
        if name in names:
            return None
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else " (job.custom_import adds others)"
        return f'must be one of {", ".join(names)}, not "{name}"{hint}'


@dataclass(frozen=True)
class Source:
    """A data source. Both functions must give the same results each time: a resume counts on it."""

    files: Callable[[Any], Sequence[str | Path]]
    """The [data] section, or the entry of a mixture → the files of the corpus, in order."""
    read: Callable[[Path], Iterator[str]]
    """A file → the text of each document in it, in order."""


LOSSES: Registry[Callable[..., Any]] = Registry("training.loss", built_in=["cross_entropy"])
"""(logits [N, V] in fp32, labels [N]) → the loss of each token, [N]."""
OPTIMIZERS: Registry[Callable[..., Any]] = Registry("optimizer.name", built_in=["adamw", "muon"])
"""(parameters by name, the [optimizer] section) → a ``torch.optim.Optimizer``."""
SCHEDULES: Registry[Callable[[float], float]] = Registry(
    "lr_scheduler.decay_type", built_in=["linear", "cosine", "sqrt"]
)
"""How much of the decay is done, in (0, 1) → how much of the learning rate is left, from 1 to 0."""
SOURCES: Registry[Source] = Registry("data.dataset", built_in=["stdlib", "files", "mixture"])


def register_loss(name: str, function: Callable[..., Any]) -> None:
    """Make ``training.loss = name`` minimise ``function``.

    function: (logits [N, V] in fp32, labels [N]) → the loss of each token, [N]. It is called on parts of the tokens.
    """
    LOSSES.register(name, function)


def register_optimizer(name: str, make: Callable[..., Any]) -> None:
    """Make ``optimizer.name = name`` update all parameters.

    make: (parameters by name, plain or DTensors; the [optimizer] section) → a ``torch.optim.Optimizer``. Its state must
    be tensors: those are saved. The learning rate of each group is set before every step.
    """
    OPTIMIZERS.register(name, make)


def register_schedule(name: str, shape: Callable[[float], float]) -> None:
    """Make ``lr_scheduler.decay_type = name`` a shape of the decay.

    shape: how much of the decay is done, in (0, 1) → how much of the learning rate is left, from 1 to 0.
    """
    SCHEDULES.register(name, shape)


def register_source(
    name: str, *, files: Callable[[Any], Sequence[str | Path]], read: Callable[[Path], Iterator[str]]
) -> None:
    """Make ``data.dataset = name`` a corpus. See ``Source``."""
    SOURCES.register(name, Source(files, read))


def import_modules(names: Sequence[str], *, key: str = "job.custom_import") -> None:
    """Import ``names``, from the working folder too. Raises UserError, naming the file and the line, if one fails."""
    if names and (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()  # a file may be younger than Python's listing of its folder
    for name in names:
        if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
            hint = f'; write "{name[:-3].replace("/", ".")}"' if name.endswith(".py") else ""
            raise UserError(f'{key}: "{name}" is not the name of a module, as my_module or my_package.my_module{hint}')
        try:
            importlib.import_module(name)
        except (UserError, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit too: a script must not end the run without a word
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is not None and f"{name}.".startswith(f"{missing}."):
                raise UserError(f'{key}: there is no module "{name}"{_nearest(name)}') from None
            raise UserError(_failed(name, error, key)) from None
    imported = [*os.environ.get(_IMPORTED, "").split(","), *names]
    os.environ[_IMPORTED] = ",".join(dict.fromkeys(module for module in imported if module))


def _failed(name: str, error: BaseException, key: str) -> str:
    if isinstance(error, SyntaxError):
        return f'{key}: "{name}" cannot be imported: {error.filename}, line {error.lineno}: {error.msg}'
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    where = f"{places[-1].filename}, line {places[-1].lineno}: " if places else ""
    return f'{key}: "{name}" cannot be imported: {where}{type(error).__name__}: {error}'


def _nearest(name: str) -> str:
    """Where it was looked for, and what there is instead."""
    parts = name.split(".")
    folder = Path(*parts[:-1]) if len(parts) > 1 else Path()
    here = [path.stem for path in folder.glob("*") if path.suffix == ".py" or (path / "__init__.py").is_file()]
    near = difflib.get_close_matches(parts[-1], here, n=1)
    hint = f"; did you mean {'.'.join([*parts[:-1], near[0]])}?" if near else ""
    return f" (looked in {Path.cwd()} and in Python's path){hint}"
