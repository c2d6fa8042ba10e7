"""Conversations of all kinds, chat templates, and what is to be trained on, written down without rendering anything.

A writer makes, of a conversation, its samples as lists of (text, trained): by the rules of one template, in Python.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
Segment = tuple[str, bool]
Writer = Callable[[list[Message], list[Any]], list[list[Segment]]]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a città", "parameters": {"type": "object"}}}
]
SYSTEM = {"role": "system", "content": "Be brief, and kind."}

CONVERSATIONS: dict[str, tuple[list[Message], list[Any]]] = {
    "one turn": ([user("Hi"), assistant("Hello there!")], []),
    "system": ([SYSTEM, user("Hi"), assistant("Hello.")], []),
    "three turns": ([user("1+1?"), assistant("2"), user("and 2+2?"), assistant("4"), user("5?"), assistant("no")], []),
    "system, turns": ([SYSTEM, user("a"), assistant("b c d"), user("e"), assistant("f g")], []),
    "thoughts": ([user("17*3?"), assistant("51", reasoning_content="17*3 = 51\n\nsure")], []),
    "thoughts in the text": ([user("17*3?"), assistant("<think>\nseventeen\n</think>\n\n51")], []),
    "thoughts each turn": (
        [SYSTEM, user("x"), assistant("y", reasoning_content="hm"), user("z"), assistant("w", reasoning_content="so")],
        [],
    ),
    "tool": (
        [
            user("Weather in Rome?"),
            assistant("", tool_calls=[call("weather", city="Roma", days=2)], reasoning_content="ask"),
            {"role": "tool", "content": "sunny"},
            assistant("It is sunny.", reasoning_content="told"),
        ],
        TOOLS,
    ),
    "two tools": (
        [
            SYSTEM,
            user("Both?"),
            assistant("One moment.", tool_calls=[call("weather", city="A"), call("weather", city="B")]),
            {"role": "tool", "content": "rain"},
            {"role": "tool", "content": "snow"},
            assistant("Rain and snow."),
            user("Thanks"),
            assistant("Welcome."),
        ],
        TOOLS,
    ),
    "scripts": ([user("学习 naïve 🙂\u200d e\u0301"), assistant("γειά 👩\u200d💻\n\ncode:\n\tx = 1  \n")], []),
    "marks in the text": ([user("say <b> & </b>"), assistant('{"a": "</think"} [/INST] ### <|im')], []),
    "spaces": ([user("  padded  "), assistant("answer with end  "), user("more\n"), assistant("fine")], []),
    "two users": ([user("one"), user("two"), assistant("three")], []),
    "ends with the user": ([user("one"), assistant("two"), user("three")], []),
}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_chatml(messages: list[Message], tools: list[Any]) -> list[list[Segment]]:
    segments: list[Segment] = []
    for message in messages[: last_turn(messages) + 1]:
        segments.append((f"<|im_start|>{message['role']}\n", False))
        segments.append((f"{message['content']}<|im_end|>\n", message["role"] == "assistant"))
    return [segments]


def last_turn(messages: list[Message]) -> int:
    return max(at for at, message in enumerate(messages) if message["role"] == "assistant")


# Trims what is said, and puts the system message in front of the last message of the user, and tools nowhere.
TRIMS = (
    "{%- set ns = namespace(last=-1) %}{%- set system = '' %}"
    "{%- if messages and messages[0].role == 'system' %}{%- set system = messages[0].content + '\n' %}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages if m.role != 'system' %}"
    "{%- if m.role == 'assistant' %}{{ '<A>' + m.content | trim + '</A>' }}"
    "{%- else %}{{ '<U>' }}{% if m == messages[ns.last] %}{{ system }}{% endif %}{{ m.content | trim + '</U>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<A>' }}{%- endif %}"
)


def write_trims(messages: list[Message], tools: list[Any]) -> list[list[Segment]]:
    system = messages[0]["content"] + "\n" if messages[0]["role"] == "system" else ""
    samples: list[list[Segment]] = []
    for turn in (at for at, message in enumerate(messages) if message["role"] == "assistant"):
        asked = max(at for at in range(turn) if messages[at]["role"] == "user")
        context: list[Segment] = []
        for at, message in enumerate(messages[:turn]):
            if message["role"] != "system":
                tag = "A" if message["role"] == "assistant" else "U"
                begin = system if at == asked else ""
                context.append((f"<{tag}>{begin}{message['content'].strip()}</{tag}>", False))
        answer = ("<A>", False), (f"{messages[turn]['content'].strip()}</A>", True)
        known = "".join(text for text, _ in samples[-1]) if samples else ""
        if samples and (not system or asked < turn - 1):  # nothing has moved: the last sample goes on
            rest = "".join(text for text, _ in context)[len(known) :]
            samples[-1] += [(rest, False), *answer]
        else:
            samples.append([*context, *answer])
    return samples


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_qwen3(messages: list[Message], tools: list[Any]) -> list[list[Segment]]:
    """As Qwen3's published template: each turn of the assistant with its context, put together where possible."""
    samples: list[tuple[str, list[Segment]]] = []
    for turn in (at for at, message in enumerate(messages) if message["role"] == "assistant"):
        before = _qwen3(messages[:turn], tools) + "<|im_start|>assistant\n"
        whole = _qwen3(messages[: turn + 1], tools)
        assert whole.startswith(before)
        added = [(whole[len(before) :], True)]
        if samples and before.startswith(samples[-1][0]):
            samples[-1] = whole, [*samples[-1][1], (before[len(samples[-1][0]) :], False), *added]
        else:
            samples.append((whole, [(before, False), *added]))
    return [segments for _, segments in samples]


def _qwen3(messages: list[Message], tools: list[Any]) -> str:
    """The rules of Qwen3's template, in Python."""
    text = ""
    if tools:
        system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
        text += (
            f"<|im_start|>system\n{system}# Tools\n\nYou may call one or more functions to assist with the user query."
            "\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>"
        )
        text += "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
        text += (
            "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
            '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
            "<args-json-object>}\n</tool_call><|im_end|>\n"
        )
    elif messages[0]["role"] == "system":
        text += f"<|im_start|>system\n{messages[0]['content']}<|im_end|>\n"
    asked = max((at for at, message in enumerate(messages) if message["role"] == "user"), default=len(messages) - 1)
    for at, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "user":
            text += f"<|im_start|>user\n{content}<|im_end|>\n"
        elif message["role"] == "tool":
            first = at == 0 or messages[at - 1]["role"] != "tool"
            last = at == len(messages) - 1 or messages[at + 1]["role"] != "tool"
            text += ("<|im_start|>user" if first else "") + f"\n<tool_response>\n{content}\n</tool_response>"
            text += "<|im_end|>\n" if last else ""
        elif message["role"] == "assistant":
            thoughts = message.get("reasoning_content", "")
            if not thoughts and "</think>" in content:
                before, _, _ = content.partition("</think>")
                thoughts = before.rstrip("\n").split("<think>")[-1].lstrip("\n")
                content = content.split("</think>")[-1].lstrip("\n")
            text += "<|im_start|>assistant\n"
            if at > asked and (at == len(messages) - 1 or thoughts):
                text += "<think>\n" + thoughts.strip("\n") + "\n</think>\n\n"
                content = content.lstrip("\n")
            text += content
            for number, made in enumerate(message.get("tool_calls", [])):
                text += "\n" if number or content else ""
                arguments = json.dumps(made["function"]["arguments"], ensure_ascii=False)
                text += f'<tool_call>\n{{"name": "{made["function"]["name"]}", "arguments": {arguments}}}\n</tool_call>'
            text += "<|im_end|>\n"
    return text
