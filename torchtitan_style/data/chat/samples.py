"""A conversation as samples: token ids, and which of them are trained on.

A turn of the assistant is what the model has to write: of the rendering up to and with the turn, what is behind the
rendering up to the turn with the generation prompt. The tokens in front of it are those that the model has read by then
when it is used: the rendering up to the turn, tokenized by itself. As long as each such context begins with all that
came before, turns go into one sample. Where it does not, because the template drops the thoughts of earlier turns,
trims or reorders, the turn begins another sample. So no turn is trained on in a context that it never has.

A template with ``{% generation %}`` marks says itself what the model writes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..tokenizer.tokenizer import Tokenizer
from .template import CHATML, ChatTemplate, Refused

TRAINED, BEGINS = 1, 2
"""Marks of a token: it is trained on; it is the first of its sample, which nothing predicts."""

_PROBE = "probe-of-a-role"
"""What a message says whose rendering is looked for."""
_NEAR = 24
"""Characters before and after a border that decide whether there is one."""

Ids = NDArray[np.uint32]
Marks = NDArray[np.uint8]


class Sample(NamedTuple):
    """Tokens that are one document of a row, each array [n]."""

    ids: NDArray[Any]
    marks: Marks | None = None
    """None: of text, all of which is trained on."""


class Conversation(NamedTuple):
    """What becomes of a conversation."""

    samples: list[Sample]
    turns: int
    """Turns of the assistant that are trained on."""
    notes: list[str]
    """What is remarkable about it."""


class Unusable(ValueError):
    """A conversation that cannot be trained on; the message says why."""


class _Growing:
    """A sample to which turns are added. text: what it is the tokens of. border: the texts before and after the last
    place where it was put together. as_whole: whether it has the tokens of the text as a whole, as the model reads it
    later on, apart from that place."""

    def __init__(self) -> None:
        self.text, self.border, self.as_whole = "", ("", ""), True
        self._ids: list[Ids] = []
        self._marks: list[Marks] = []

    def add(self, ids: Ids, marks: Marks | int) -> None:
        self._ids.append(ids)
        self._marks.append(np.full(len(ids), marks, np.uint8) if isinstance(marks, int) else marks)

    @property
    def ids(self) -> Ids:
        if len(self._ids) > 1:
            self._ids = [np.concatenate(self._ids)]
        return self._ids[0] if self._ids else np.empty(0, np.uint32)

    def done(self) -> Sample:
        marks = np.concatenate(self._marks)
        marks[0] = BEGINS
        return Sample(self.ids, marks)


class Sampler:
    """Makes the samples of conversations. train_on: "assistant", "last" or "all"."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, train_on: str) -> None:
        self.template, self.tokenizer, self.train_on = template, tokenizer, train_on
        added = sorted(tokenizer.added_tokens(), key=len, reverse=True)
        special = "|".join(map(re.escape, added)) or "(?!)"
        self._special = re.compile(special)
        self._begins_special = self._special.match
        self._added = tuple(added)
        self._left_out: dict[str, bool] = {}
        """Of roles that were met: whether the template leaves out their messages."""

    def __call__(self, text: str) -> Conversation:
        """The samples of a conversation that ``Conversations.text_of`` has made. Raises Unusable."""
        conversation = json.loads(text)
        messages, tools = conversation["messages"], conversation.get("tools")
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns and self.train_on != "all":
            raise Unusable("no assistant turn, so no token to train on")
        notes = self._notes(messages, tools)
        if self.train_on == "last":
            turns = turns[-1:]
        try:
            if self.train_on == "all":
                samples = self._put_together(self._all_of(messages, tools, turns))
            elif self.template.has_marks:
                samples = self._by_marks(messages, tools, turns)
            else:
                turns = self._without_first(messages, tools, turns, notes)
                samples = self._put_together(self._turns(messages, tools, turns))
        except Refused as error:
            raise Unusable(f"the chat template rejects it: {error}") from None
        if self.train_on == "all":
            for sample in samples:
                assert sample.marks is not None
                sample.marks[1:] = TRAINED
        return Conversation(samples, len(turns), notes)

    def _without_first(self, messages: Any, tools: Any, turns: list[int], notes: list[str]) -> list[int]:
        """``turns``, but for a first message that the template has no generation prompt for."""
        if not turns or turns[0] != 0:
            return turns
        try:
            self.template.render_each([[]], tools=tools, prompt=True)
        except Refused:
            if len(turns) == 1:
                raise Unusable("its only assistant turn is the first message, which answers nothing") from None
            notes.append("its first message is the assistant's, which is not trained on")
            return turns[1:]
        return turns

    def _turns(self, messages: Any, tools: Any, turns: list[int]) -> list[tuple[str, str]]:
        """Of each turn the text that it is written behind, and the text that is written. Raises Unusable."""
        befores = self.template.render_each([messages[:turn] for turn in turns], tools=tools, prompt=True)
        wholes = self.template.render_each([messages[: turn + 1] for turn in turns], tools=tools, prompt=False)
        for turn, before, whole in zip(turns, befores, wholes, strict=True):
            if not whole.startswith(before):
                same = _common(before, whole)
                raise Unusable(
                    f"the chat template renders message {turn + 1} differently than its generation prompt begins: "
                    f"{json.dumps(whole[same : same + 40])} where the prompt has {json.dumps(before[same:])}"
                )
        return [(before, whole[len(before) :]) for before, whole in zip(befores, wholes, strict=True)]

    def _all_of(self, messages: Any, tools: Any, turns: list[int]) -> list[tuple[str, str]]:
        """The text up to the end of each turn and of the whole, as context of nothing."""
        ends = [*(turn + 1 for turn in turns if turn + 1 < len(messages)), len(messages)]
        wholes = self.template.render_each([messages[:end] for end in ends], tools=tools, prompt=False)
        return [(whole, "") for whole in wholes]

    def _put_together(self, pairs: list[tuple[str, str]]) -> list[Sample]:
        """Samples of contexts and turns, tokenized apart, as they are when the model is used."""
        if not self.tokenizer.joins_pieces:  # as those that put a space in front of each
            texts = [(before + turn, [(len(before), len(before + turn))]) for before, turn in pairs]
            return self._grow(texts)
        grown: list[_Growing] = []
        known = "", np.empty(0, np.uint32)
        for before, turn in pairs:
            if not grown or not self._extend(grown[-1], before):
                if grown:  # contexts of the same conversation mostly begin alike
                    ids, known = self._encode_after(known, before)
                else:
                    ids = self._encode(before)
                grown.append(_Growing())
                grown[-1].add(ids, 0)
            grown[-1].add(self._encode(turn), TRAINED)
            grown[-1].text = before + turn
            grown[-1].border = before[-_NEAR:], turn[:_NEAR]
        return [sample.done() for sample in grown]

    def _is_border(self, before: str, turn: str) -> bool:
        """Whether no token reaches across from one text to the other if both are one."""
        apart = np.concatenate((self._encode(before), self._encode(turn)))
        return np.array_equal(apart, self._encode(before + turn))

    def _encode_after(self, known: tuple[str, Ids], text: str) -> tuple[Ids, tuple[str, Ids]]:
        """Token ids of ``text``, and the beginning of it up to its last special token, with its ids. known: such a
        beginning of another text."""
        before, before_ids = known if text.startswith(known[0]) else ("", known[1][:0])
        rest = text[len(before) :]
        end = max((match.end() for match in self._special.finditer(rest)), default=0)
        ids = np.concatenate((before_ids, self._encode(rest[:end])))
        return np.concatenate((ids, self._encode(rest[end:]))), (text[: len(before) + end], ids)

    def _extend(self, sample: _Growing, text: str) -> bool:
        """Add to ``sample`` what it lacks of ``text``, if the tokens of ``text`` begin with it. Whether they do."""
        if not text.startswith(sample.text):
            return False
        rest = text[len(sample.text) :]
        sample.as_whole = sample.as_whole and self._is_border(*sample.border)
        if sample.as_whole and (not rest or self._begins_special(rest) or sample.text.endswith(self._added)):
            sample.add(self._encode(rest), 0)  # no token reaches across
            return True
        return self._extend_ids(sample, self._encode(text), 0)

    @staticmethod
    def _extend_ids(sample: _Growing, ids: Ids, marks: Marks | int) -> bool:
        count = len(sample.ids)
        if not np.array_equal(sample.ids, ids[:count]):
            return False
        sample.add(ids[count:], marks if isinstance(marks, int) else marks[count:])
        return True

    def _by_marks(self, messages: Any, tools: Any, turns: list[int]) -> list[Sample]:
        """Samples of whole renderings, trained on where the template says so."""
        text, spans = self.template.render_marked(messages, tools=tools)
        wholes = self.template.render_each([messages[: turn + 1] for turn in turns], tools=tools, prompt=False)
        if self.train_on == "assistant" and all(text.startswith(whole) for whole in wholes):
            return self._grow([(text, spans)])
        befores = self.template.render_each([messages[:turn] for turn in turns], tools=tools, prompt=False)
        texts = []
        for turn, before in zip(turns, befores, strict=True):
            text, spans = self.template.render_marked(messages[: turn + 1], tools=tools)
            begin = _common(before, text)
            texts.append((text, [span for span in spans if span[1] > begin]))
        return self._grow(texts)

    def _grow(self, texts: list[tuple[str, list[tuple[int, int]]]]) -> list[Sample]:
        """Samples of ``texts``, each with the places in it that are trained on, as far as it is new."""
        grown: list[_Growing] = []
        for text, spans in texts:
            ids, offsets = self.tokenizer.encode_with_offsets(text)
            marks = np.zeros(len(ids), np.uint8)
            for begin, end in spans:
                marks[(offsets[:, 0] < end) & (offsets[:, 1] > begin)] = TRAINED
            if not grown or not self._extend_ids(grown[-1], ids, marks):
                grown.append(_Growing())
                grown[-1].add(ids, marks)
        return [sample.done() for sample in grown]

    def _encode(self, text: str) -> Ids:
        return self.tokenizer.encode_batch([text])[0]

    def _notes(self, messages: Any, tools: Any) -> list[str]:
        """What is odd about a conversation, and kept."""
        notes = []
        roles = [message["role"] for message in messages]
        if any(pair == ("user", "user") for pair in itertools.pairwise(roles)):
            notes.append("two user messages in a row")
        used = {key for message in messages for key in ("reasoning_content", "tool_calls") if message.get(key)}
        used |= {"tools"} if tools else set()
        if unknown := sorted(key for key in used if key not in self.template.source):
            what = "ChatML, which stands in for a chat template," if self.template.source == CHATML else "the template"
            notes.append(f"{what} leaves out its {' and '.join(unknown)}")
        for role in sorted(set(roles) - {"assistant"}):
            if self._leaves_out(role):
                notes.append(f'the template leaves out its messages of the role "{role}"')
        return notes

    def _leaves_out(self, role: str) -> bool:
        """Whether the template renders nothing for a message of ``role``."""
        if role not in self._left_out:
            message = {"role": role, "content": _PROBE}
            found = []
            for conversation in ([message], [{"role": "user", "content": "x"}, message]):
                with contextlib.suppress(Refused):  # maybe because of the message's place
                    found += self.template.render_each([conversation], prompt=False)
            self._left_out[role] = bool(found) and not any(_PROBE in text for text in found)
        return self._left_out[role]


def _common(a: str, b: str) -> int:
    """How many characters ``a`` and ``b`` begin with in common."""
    return next((at for at, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
