"""Wildcards in local paths: ``*``, ``?``, ``[…]``, and ``**`` for any depth, as ``glob`` has them.

Unlike ``glob``, a name that exists as it is written is that file or folder, and ``**`` enters each folder once,
so that links to a folder above do not lead around in circles.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator


def expand(pattern: str) -> list[str]:
    """The files that ``pattern`` matches, sorted."""
    if os.path.isfile(pattern):
        return [pattern]
    base = "/" if pattern.startswith("/") else ""
    parts = [part for part in pattern.split("/") if part]
    return sorted({path for path in _matches(base, parts) if os.path.isfile(path)})


def _matches(base: str, parts: list[str]) -> Iterator[str]:
    """Paths below ``base`` that match ``parts``, a name or pattern for each level."""
    if not parts:
        yield base
        return
    first, *rest = parts
    if first == "**":
        for folder in _folders(base, set()):
            if rest:
                yield from _matches(folder, rest)
            else:
                yield from (os.path.join(folder, name) for name in _names(folder))
        return
    literal = os.path.join(base, first)
    if os.path.lexists(literal) or first in (".", ".."):
        yield from _matches(literal, rest)
        return
    names = [name for name in _names(base, hidden=first.startswith(".")) if fnmatch.fnmatch(name, first)]
    for name in names:
        yield from _matches(os.path.join(base, name), rest)


def _folders(base: str, entered: set[tuple[int, int]]) -> Iterator[str]:
    """``base`` and the folders below it. entered: device and inode of those that were visited."""
    try:
        stat = os.stat(base or ".")
    except OSError:
        return
    if (stat.st_dev, stat.st_ino) in entered:
        return
    entered.add((stat.st_dev, stat.st_ino))
    yield base
    # In the order of the paths below them, so that of a folder's names the first in that order is kept.
    for name in sorted(_names(base), key=lambda name: f"{name}/"):
        path = os.path.join(base, name)
        if os.path.isdir(path):
            yield from _folders(path, entered)


def _names(folder: str, *, hidden: bool = False) -> list[str]:
    """What is in ``folder``; nothing if it cannot be listed."""
    try:
        return [name for name in os.listdir(folder or ".") if hidden or not name.startswith(".")]
    except OSError:
        return []
