"""A row of a data set as a conversation, whichever of the usual forms it has.

    {"messages": [{"role": "user", "content": "…"}, …], "tools": […]}                OpenAI, Transformers
    {"conversations": [{"from": "human", "value": "…"}, …], "system": "…"}           ShareGPT
    {"prompt": "…", "completion": "…"}, or lists of messages in both                 TRL
    {"instruction": "…", "input": "…", "output": "…"}                                Alpaca

What comes out is one text: JSON with ``messages`` and perhaps ``tools``, in Transformers' form. It is the document that
is hashed, counted and handed to the encoder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

MESSAGE_LISTS = ("messages", "conversations", "conversation")
"""Columns that are looked for, in this order."""
_PAIRS = (("prompt", "completion"), ("instruction", "output"))
_BESIDE = ("tools", "system", "input")
"""Columns that belong to a conversation, beside the one that makes it one."""

_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""The role that each name stands for."""
_CALL = "function_call"
"""In ShareGPT's form: the assistant calls a tool, with name and arguments as JSON."""


class NoConversation(ValueError):
    """A row that is no conversation; the message says why."""


@dataclass(frozen=True)
class Conversations:
    """Which columns of a row are read as a conversation. messages_key: the one with the messages; "": found by name."""

    messages_key: str = ""

    def columns(self, names: Sequence[str]) -> list[str]:
        """Those of a table's columns that are needed. Raises NoConversation, with the columns that there are."""
        if found := self._source(names):
            return [name for name in names if name in (*found, *_BESIDE)]
        raise NoConversation(f"{self._missing('column')}; it has {', '.join(names)}")

    def text_of(self, record: dict[str, Any]) -> str:
        """The conversation in a row, as JSON. Raises NoConversation."""
        source = self._source(record)
        if not source:
            raise NoConversation(f"{self._missing('field')}; it has {', '.join(record) or 'nothing'}")
        if source == ("instruction", "output"):
            messages = _of_instruction(record)
        elif len(source) == 2:
            messages = [*_list(record, source[0], "user"), *_list(record, source[1], "assistant")]
        else:
            messages = _list(record, source[0], None)
        messages = [_message(message, number) for number, message in enumerate(messages, start=1)]
        if not messages:
            raise NoConversation("it has no messages")
        system = record.get("system")
        if isinstance(system, str) and system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        conversation: dict[str, Any] = {"messages": messages}
        if tools := _tools(record.get("tools")):
            conversation["tools"] = tools
        return json.dumps(conversation, ensure_ascii=False)

    def _source(self, names: Iterable[str]) -> tuple[str, ...]:
        """The column or the two columns with the messages; () if there are none."""
        present = set(names)
        if self.messages_key:
            return (self.messages_key,) if self.messages_key in present else ()
        one = next(((name,) for name in MESSAGE_LISTS if name in present), ())
        return one or next((pair for pair in _PAIRS if present.issuperset(pair)), ())

    def _missing(self, what: str) -> str:
        if self.messages_key:
            return f'no {what} "{self.messages_key}" (data.messages_key)'
        pairs = " or ".join(" and ".join(pair) for pair in _PAIRS)
        return f"no conversation: no {what} {', '.join(MESSAGE_LISTS)}, nor {pairs}; data.messages_key names another"


def contents_of(text: str) -> str:
    """What is said in a conversation that ``text_of`` has made, without roles: what a tokenizer is trained on."""
    said = (message.get(key) for message in json.loads(text)["messages"] for key in ("reasoning_content", "content"))
    return "\n".join(part for part in said if part)


def _of_instruction(record: dict[str, Any]) -> list[Message]:
    parts = [record.get("instruction"), record.get("input")]
    question = "\n\n".join(part for part in parts if isinstance(part, str) and part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def _list(record: dict[str, Any], key: str, role: str | None) -> list[Any]:
    """The messages under ``key``: a list, a list as JSON, or, where ``role`` is given, the text of its only message."""
    value = record[key]
    if role and isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, list):
        raise NoConversation(f'"{key}" must be a list of messages, not {_kind(value)}')
    return value


def _message(message: Any, number: int) -> Message:
    """One message in Transformers' form, without what is null."""
    if not isinstance(message, dict):
        raise NoConversation(f"message {number} must be an object, not {_kind(message)}")
    found = {key: value for key, value in message.items() if value is not None}
    name = found.pop("from", None) if "role" not in found else found.pop("role")
    content = found.pop("value", None) if "content" not in found else found.pop("content")
    if name == _CALL:
        name, found["tool_calls"], content = "assistant", [_call(content, number)], ""
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(dict.fromkeys(_ROLES.values()))
        raise NoConversation(f"message {number} has the unknown role {json.dumps(name)}; known are {known}")
    if content is None and found.get("tool_calls"):
        content = ""  # as OpenAI's are
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    if not isinstance(content, str):
        raise NoConversation(f"the content of message {number} ({role}) is {_kind(content)}, not text")
    return {"role": role, "content": content, **found}


def _part(part: Any, number: int) -> str:
    """The text of one part of a content."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else _kind(part)
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise NoConversation(f'a part of message {number} is of type "{kind}"; only text is read')
    return text


def _call(content: Any, number: int) -> dict[str, Any]:
    call = _parsed(content) if isinstance(content, str) else content
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise NoConversation(f'message {number} is a {_CALL}: its value must be a JSON object with a "name"')
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def _tools(value: Any) -> list[Any]:
    """The tools of a conversation: a list of schemas, or one as JSON."""
    if isinstance(value, str):
        value = _parsed(value) if value.strip() else None
        if value is None:
            return []
    if not value:
        return []
    if isinstance(value, list):
        value = [_parsed(tool) if isinstance(tool, str) else tool for tool in value]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise NoConversation('"tools" must be a list of JSON schemas')
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list"}
    return names.get(type(value), type(value).__name__)


def without_nulls(value: Any) -> Any:
    """``value`` without the fields that are null: a table has every field of any row in each."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
