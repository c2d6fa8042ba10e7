"""Reading files that others wrote: regular files of a bounded size, as bytes, text, JSON or TOML.

What cannot be read raises OSError or ValueError, whatever is wrong with it; the caller knows what the file was for.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

JSON_BYTES = 2**24
"""Size of a JSON file at most, where nothing else is said: parsed, it takes up to twenty times as much memory."""
LINE_BYTES = 2**22
"""Length of a line in a file of JSON lines that this program writes."""
_TOML_BYTES = 2**21
_DEPTH = 100
"""Levels of lists and objects inside each other."""
_BITS = 1000
"""Of a whole number: 300 digits, which still are a float."""

# Bare or quoted names with dots between them. tomllib takes time that grows with the square of their number.
_NAME = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(rf"(?<![\w.-]){_NAME}(?:[ \t]*\.[ \t]*{_NAME}){{{_DEPTH}}}", re.ASCII)


def file_problem(path: str | os.PathLike[str]) -> OSError | None:
    """Why ``path`` is no regular file that can be opened without waiting for anybody; None if it is one."""
    try:
        info = os.stat(path)
    except ValueError as error:  # a NUL, or characters that are none
        return OSError(errno.EINVAL, f"not the name of a file: {error}", str(path))
    except OSError as error:
        return error
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    kind = kinds.get(stat.S_IFMT(info.st_mode))
    if kind is None and info.st_dev in _kernel_devices():
        kind = "made up by the kernel"  # reading some of these files waits for events, or has no end
    if kind is None:
        return None
    number = errno.EISDIR if kind == "a folder" else errno.EINVAL
    return OSError(number, f"it is {kind}, not a regular file", str(path))


def name_problem(path: str | os.PathLike[str]) -> str | None:
    """Why nothing can have this name; None if something could."""
    try:
        os.stat(path)
    except ValueError as error:
        return f"not the name of a file: {error}"
    except OSError as error:
        return error.strerror if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else None
    return None


def _kernel_devices() -> set[int]:
    found = set()
    for place in ("/proc", "/sys"):
        try:
            found.add(os.stat(place).st_dev)
        except OSError:
            continue
    return found - {os.stat("/").st_dev}


def open_regular(path: str | os.PathLike[str], *, buffering: int = -1) -> BinaryIO:
    """Open a regular file to read its bytes. Raises OSError for anything else, at once."""
    if problem := file_problem(path):
        raise problem
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it has changed meanwhile
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return os.fdopen(descriptor, "rb", buffering=buffering)  # type: ignore[return-value]
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | os.PathLike[str], *, most: int) -> bytes:
    """The content of a regular file. Raises ValueError if it has more than ``most`` bytes."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content


def read_text(path: str | os.PathLike[str], *, most: int = JSON_BYTES) -> str:
    """The same as text. A byte order mark, with which some editors begin a file, is left out."""
    return read_bytes(path, most=most).decode("utf-8-sig")


def parse_json(text: str | bytes) -> Any:
    """A JSON value. Raises ValueError for what is not one, and for what no file of ours needs: a key twice in an
    object, deep nesting, numbers of hundreds of digits, halves of characters."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise _in_short(error) from None
    _check(value)
    return value


def read_json(path: str | os.PathLike[str], *, most: int = JSON_BYTES) -> Any:
    """The value in a JSON file. Raises OSError or ValueError."""
    return parse_json(read_text(path, most=most))


def read_json_object(path: str | os.PathLike[str], *, most: int = JSON_BYTES) -> dict[str, Any]:
    """The same, where it must be an object."""
    value = read_json(path, most=most)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def json_lines(path: str | os.PathLike[str], *, longest: int = LINE_BYTES) -> Iterator[tuple[bytes, Any]]:
    """Each line of a file that a program has appended to, and its JSON value; None for what is not JSON, as of a line
    that a full disk has cut. A longer line counts as several. Raises OSError."""
    with open_regular(path) as file:
        while line := file.readline(longest):
            try:
                yield line, parse_json(line)
            except ValueError:
                yield line, None


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML document, with the limits of ``parse_json``; whole numbers have 64 bits, as in TOML's definition."""
    if _LONG_KEY.search(text):
        raise ValueError("a key has too many parts")
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise _in_short(error) from None
    _check(value, bits=63, nul=False)
    return value


def read_toml_text(path: str | os.PathLike[str]) -> str:
    """The text of a TOML file. Raises OSError or ValueError."""
    return read_text(path, most=_TOML_BYTES)


def toml_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a TOML file. Raises OSError or ValueError."""
    return parse_toml(read_toml_text(path))


def _in_short(error: ValueError) -> ValueError:
    return ValueError("a number of thousands of digits") if "int_max_str_digits" in str(error) else error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f'the key "{twice[:80]}" is there twice')
    return found


def _check(value: Any, *, bits: int = _BITS, nul: bool = True) -> None:
    """Raise ValueError for what is too deep, too large, or not text."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _DEPTH:
            raise ValueError("it is nested too deeply")
        below: list[Any] = []
        for each in level:
            if isinstance(each, str):
                check_text(each, nul=nul)
            elif isinstance(each, dict):
                for key in each:
                    check_text(key, nul=nul)
                below += each.values()
            elif isinstance(each, list):
                below += each
            elif isinstance(each, int) and each.bit_length() > bits:
                raise ValueError(f"a number of about {each.bit_length() * 3 // 10:,} digits is too large")
        level = below


def check_text(text: str, *, nul: bool = False) -> None:
    """Raise ValueError unless ``text`` can be written as UTF-8. nul: whether it may have NULs, which no name can."""
    if not nul and "\0" in text:
        raise ValueError("text has a NUL character")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not UTF-8, at character {error.start + 1}") from None
