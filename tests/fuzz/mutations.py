"""Changes to valid input: of bytes, and of the values in JSON and TOML.

All take a ``random.Random``. That of the hypothesis strategies is one that hypothesis can shrink; that of the long run
is Python's own, and a hundred times as fast.
"""

from __future__ import annotations

import json
import math
from random import Random
from typing import Any

import tomli_w

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**20, 10**9, 10**7, -(2**70), 10**299),
    *(0.0, 0.5, 1.0, 2.0, -1.5, 1e308, 1e-320, math.nan, math.inf, -math.inf),
    *("", "x", "x" * 300, "../x", "/dev/zero", "a\x00b", "\ud800", "\u202e", "<u4", "1", "true", "[", "step-1"),
    *([], [[]], [0], [1, 2], ["x"], [None], {}, {"x": 1}, {"type": "x"}, {"content": 1}),
)
"""What takes the place of a value."""

TEXTS = (
    *(b"nan", b"inf", b"1e400", b"-0", b"9" * 400, b"9" * 5000, b"null", b"# ", b"="),
    *(b'"', b"'", b"{", b"}", b"[", b"]", b"(", b"[" * 3000, b'{"a":' * 3000),
    *(b"\n", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\u0000", b"\\ud800"),
)
"""What is put between bytes."""


def mutated(data: bytes, kind: str, random: Random) -> bytes:
    """``data`` with one to three changes. kind: "json", "jsonl", "toml", "pickle" or "bytes"."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        structured = random.random() < 0.75
        if kind == "json" and structured:
            data = _json(data, random)
        elif kind == "jsonl" and structured:
            lines = data.split(b"\n")
            at = random.randrange(len(lines))
            lines[at] = _json(lines[at], random)
            data = b"\n".join(lines)
        elif kind == "toml" and structured:
            data = _toml(data, random)
        else:
            data = _bytes(data, random)
    return data


def _bytes(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    stop = min(start + random.choice((1, 1, 2, 4, 8, 100)), len(data))
    change = random.randrange(8)
    if change == 0:
        return data[:start]
    if change == 1:
        return data[:start] + data[stop:]
    if change == 2:
        return data[:stop] + data[start:]
    if change == 3:
        return data[:start] + random.choice(TEXTS) + data[stop:]
    if change == 4:
        return data[:start] + random.choice(TEXTS) + data[start:]
    if change == 5 and start < len(data):
        return data[:start] + bytes([random.randrange(256)]) + data[start + 1 :]
    if change == 6:
        return data[:start] + random.choice((b"\xff", b"\0", b"\x7f")) * (stop - start) + data[stop:]
    if start < len(data):
        return data[:start] + bytes([data[start] ^ (1 << random.randrange(8))]) + data[start + 1 :]
    return data + b"x"


def changed(tree: Any, random: Random) -> Any:
    """A JSON value with something else somewhere in it."""
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            places.append((value, key))
            if isinstance(each, dict | list):
                visit(each)

    if isinstance(tree, dict | list):
        visit(tree)
    if not places or random.random() < 0.02:
        return random.choice(VALUES)
    holder, key = places[random.randrange(len(places))]
    change = random.randrange(8)
    if change == 0:
        del holder[key]
    elif change == 1 and isinstance(holder, dict):
        holder[random.choice((f"{key}x", "", "x" * 300, "a\x00", "../x", "__metadata__"))] = holder.pop(key)
    elif change == 2:
        other, at = places[random.randrange(len(places))]
        holder[key] = json.loads(json.dumps(other[at]))
    elif change == 3 and isinstance(holder[key], int | float):
        was = holder[key]
        holder[key] = random.choice((was + 1, was - 1, -was, was * 1000, float(was)))
    elif change == 4:
        deep: Any = random.choice(VALUES)
        for _ in range(random.choice((1, 50, 300))):
            deep = [deep]
        holder[key] = deep
    else:
        holder[key] = random.choice(VALUES)
    return tree


def _json(data: bytes, random: Random) -> bytes:
    try:
        tree = changed(json.loads(data), random)
        return json.dumps(tree).encode(errors="surrogatepass")
    except (ValueError, RecursionError, OverflowError):
        return _bytes(data, random)


def _toml(data: bytes, random: Random) -> bytes:
    import tomllib

    try:
        return tomli_w.dumps(changed(tomllib.loads(data.decode()), random)).encode(errors="surrogatepass")
    except (ValueError, TypeError, RecursionError, AttributeError, OverflowError):
        return _bytes(data, random)
