"""Token ids become text while they come: whole characters only, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNKNOWN = "\ufffd"
"""What a decoder writes for bytes that are no character, as for the first bytes of one that is not complete."""
_LONGEST = 4
"""Bytes of the longest UTF-8 character, and so the most tokens that one can be split over."""


class TextStream:
    """The text of one row. ``push`` and ``finish`` return what can be shown; joined, it is the whole text.

    decode: token ids → text, special tokens left out. stop: strings that end the text, themselves left out.
    before: the token ids that the text goes on from; some decoders join words by what is before them.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], *, stop: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self._decode, self._stop = decode, [s for s in stop if s]
        self._ids = list(before[-_LONGEST:])
        # Tokens from _start to _read have been decoded; they are decoded again with the new ones, as their context.
        self._start, self._read = 0, len(self._ids)
        self._held = ""
        self.stopped = False
        """Whether a stop string has come. Nothing is returned after it."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now, often none."""
        self._ids.append(token)
        return self._release(self._new_text(), last=False)

    def finish(self) -> str:
        """The rest of the text, when no token follows."""
        return self._release(self._new_text(last=True), last=True)

    def _new_text(self, *, last: bool = False) -> str:
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        stop = len(self._ids)
        if text.endswith(_UNKNOWN) and not last:
            if stop - self._read < _LONGEST:
                return ""
            stop = self._certain()  # some of it is no character, and never will be
            text = self._decode(self._ids[self._start : stop])
        self._start, self._read = self._read, stop
        if text.endswith(_UNKNOWN):  # what follows must not be joined to it
            self._start = stop
        return text[len(known) :]

    def _certain(self) -> int:
        """Where the tokens end that no later one can make another text of; the rest may begin a character."""
        new = self._ids[self._read :]
        for at in range(len(new) - _LONGEST + 1, len(new)):
            rest = self._decode(new[at:])
            if rest.count(_UNKNOWN) == 1 and self._decode(new[:at]) + rest == self._decode(new):
                return self._read + at
        return len(self._ids)

    def _release(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        ends = [at for at in map(text.find, self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = 0 if last else overlap(text, self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that one of ``strings`` begins with, but is not all of."""
    most = min(len(text), max(map(len, strings), default=1) - 1)
    return next((n for n in range(most, 0, -1) if any(s.startswith(text[-n:]) for s in strings)), 0)
