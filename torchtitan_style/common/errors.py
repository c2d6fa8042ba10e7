"""The exceptions that end a run with a message instead of a traceback, and text that is short enough to be one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_LINES, _LINE, _TEXT = 60, 1500, 12_000
"""A message has at most so many lines, characters in a line, and characters."""


class UserError(Exception):
    """A mistake that a person can correct: the message says what was found, where, and what to do.

    Commands print it without a traceback and exit with status 2.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(bounded(str(message)))


class RunError(Exception):
    """A run that cannot continue, though nobody made a mistake: exit status 1, no traceback."""

    def __init__(self, message: object = "") -> None:
        super().__init__(bounded(str(message)))


def bounded(text: str) -> str:
    """``text`` as a message: what is too long is left out, and characters that control a terminal are spelled out."""
    lines = cut(text, 20 * _TEXT).split("\n")
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"… and {len(lines) - _LINES + 1:,} more lines"]
    return cut("\n".join(_printable(cut(line, _LINE)) for line in lines), _TEXT)


def cut(text: str, most: int) -> str:
    """``text``, with its middle left out where it has more than about ``most`` characters."""
    if len(text) <= most:
        return text
    tail = most // 4
    return f"{text[: most - tail]} … ({len(text) - most:,} more characters) … {text[len(text) - tail :]}"


def shown(value: object, most: int = 120) -> str:
    """A value that somebody wrote, for a message about it: text in quotes, and a long value in part."""
    if isinstance(value, str):
        return f'"{cut(value, most)}"'
    if isinstance(value, bool):
        return str(value).lower()  # as in TOML and JSON
    if isinstance(value, int) and value.bit_length() > 400:
        return f"a number of about {value.bit_length() * 3 // 10:,} digits"
    if isinstance(value, dict | list | tuple | set | bytes) and len(value) > 20:
        return f"a {type(value).__name__} of {len(value):,}"
    try:
        return cut(repr(value), most)
    except (RecursionError, ValueError):  # nested deep; a number of thousands of digits in it
        return f"a {type(value).__name__}"


def some(names: Iterable[object], most: int = 4) -> str:
    """The first few of ``names``, and how many more there are."""
    found: Sequence[object] = list(names)
    text = ", ".join(cut(str(name), 80) for name in found[:most])
    return text + (f" and {len(found) - most:,} more" if len(found) > most else "")


def _printable(line: str) -> str:
    if line.isprintable():
        return line
    controls = {n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160)) if n != 9}
    return line.translate(controls).encode(errors="backslashreplace").decode()
