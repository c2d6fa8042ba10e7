"""The values of a JSON array, or objects one after another over several lines, read piece by piece."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

_SPACE = re.compile(r"[ \t\r\n]*")


class _Text:
    """Decoded text of ``content`` that is not used up, from ``at`` on."""

    def __init__(self, content: IO[bytes], piece: int) -> None:
        self.content, self.piece = content, piece
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.text, self.at, self.at_end = "", 0, False

    def more(self) -> None:
        """Read on: a piece, or as much as there is already."""
        rest = self.text[self.at :]
        block = self.content.read(max(self.piece, len(rest)))
        self.at_end = not block
        self.text, self.at = rest + self.decode(block, final=self.at_end), 0

    def next_character(self) -> str:
        """The first character that is no space; "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or self.at_end:
                return self.text[self.at : self.at + 1]
            self.more()


def json_values(content: IO[bytes], *, piece: int, longest: int) -> Iterator[Any]:
    """The elements of an array, or the values of a sequence.

    piece: bytes to read at once. longest: characters of an element at most; memory is bounded by twice that.
    Raises ValueError where the file cannot be understood from there on.
    """
    text = _Text(content, piece)
    in_array = text.next_character() == "["
    text.at += in_array
    while character := text.next_character():
        if in_array and character == ",":
            text.at += 1
        elif in_array and character == "]":
            text.at += 1
            if text.next_character():
                raise ValueError("there is text after the end of the array")
            return
        else:
            yield _value(text, longest)
    if in_array:
        raise ValueError("the array has no end")


def _value(text: _Text, longest: int) -> Any:
    while True:
        try:
            value, end = json.JSONDecoder().raw_decode(text.text, text.at)
            if end < len(text.text) or text.at_end:  # else a number may go on
                text.at = end
                return value
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        except ValueError as error:
            if text.at_end:
                raise
            if len(text.text) - text.at > longest:
                raise ValueError(f"{error}, or an element is longer than data.max_document_bytes allows") from None
        text.more()
