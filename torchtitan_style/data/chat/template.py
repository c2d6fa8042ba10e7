"""The chat template of a tokenizer: how messages become the text that a model reads and writes.

Jinja, rendered by Transformers in its sandbox. A tokenizer without one gets ChatML.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from torchtitan_style.common.errors import UserError, cut, shown
from torchtitan_style.common.reading import read_json_object, read_text
from torchtitan_style.common.signals import OutOfTime, time_limit
from torchtitan_style.common.typed import Content, typed
from torchtitan_style.models.hf_folder import special_tokens

TEMPLATE_FILE = "chat_template.jinja"

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""OpenAI's ChatML, as Qwen's models have it."""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

_ANSWER, _NEXT = "an-answer-to-look-for", "a-question-to-look-for"
"""Messages that are found again in a rendered conversation."""


class _Named(Content):
    name: str
    template: str


_NAMED = TypeAdapter(list[_Named])

_SECONDS = 20
"""That a template may take for its conversations: it is a program, and may have no end."""


class ChatTemplate:
    """source: in Jinja. special_tokens: by role, as a template knows them. path: the file that it is from."""

    def __init__(self, source: str, special_tokens: dict[str, str], path: Path | None = None) -> None:
        self.source, self._special_tokens, self.path = source, special_tokens, path

    @classmethod
    def find(cls, assets: Path) -> ChatTemplate | None:
        """The template among a tokenizer's files, or None. Raises UserError if they cannot be read."""
        path = assets / "tokenizer_config.json"
        try:
            settings = read_json_object(path, most=2**26) if path.is_file() else {}
            separate = assets / TEMPLATE_FILE
            source = read_text(separate) if separate.is_file() else settings.get("chat_template")
            if isinstance(source, list):  # several, by name
                source = {each.name: each.template for each in typed(_NAMED, source)}.get("default")
            if not isinstance(source, str | None):
                raise ValueError(f"chat_template must be text, not {shown(source)}")
            special = special_tokens(assets)
        except (OSError, ValueError) as error:
            raise UserError(f"{assets}: the chat template cannot be read: {error}") from None
        return cls(source, special, separate if separate.is_file() else path) if source else None

    @property
    def thinks(self) -> bool:
        """Whether it knows of a thinking mode."""
        return "enable_thinking" in self.source

    @property
    def has_marks(self) -> bool:
        """Whether it marks what the model writes, with ``{% generation %}``."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    @property
    def fingerprint(self) -> str:
        """Changes whenever some conversation might be rendered otherwise."""
        content = json.dumps([self.source, sorted(self._special_tokens.items())])
        return hashlib.sha256(content.encode()).hexdigest()

    def check(self) -> None:
        """Raise UserError, with file and line, if it is no template."""
        from jinja2 import Environment, TemplateSyntaxError

        # Most need not wait for Transformers to be imported, which takes a second and alone knows marks.
        with contextlib.suppress(Exception):
            Environment(extensions=["jinja2.ext.loopcontrols"]).compile(self.source)
            return
        try:
            with time_limit(_SECONDS):
                self._render([[]], prompt=False)
        except TemplateSyntaxError as error:
            raise UserError(f"{self.path}: the chat template, line {error.lineno}: {error.message}") from None
        except Exception:  # a template may refuse a conversation without messages, in any way
            return

    def end_of_turn(self, *, system: str | None = None) -> str:
        """The text that the template puts after an answer, "" if it cannot be told.

        It is what follows the last message, or, if that is only white space, what is between it and the next one.
        """
        first = [{"role": "system", "content": system}] if system else []
        first += [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
        try:
            last = self.render(first, answer_follows=False)
            between = self.render([*first, {"role": "user", "content": _NEXT}], answer_follows=False)
        except UserError:  # it takes no such conversation
            return ""
        end = last.rpartition(_ANSWER)[2] if _ANSWER in last else ""
        if not end.strip() and _NEXT in between.rpartition(_ANSWER)[2]:
            end = between.rpartition(_ANSWER)[2].partition(_NEXT)[0]
        return end.rstrip()

    def render(
        self, messages: Sequence[dict[str, str]], *, thinking: bool | None = None, answer_follows: bool = True
    ) -> str:
        """The text of ``messages``, up to where the model's answer begins if ``answer_follows``.

        Raises UserError if the template refuses them.
        """
        options: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        try:
            (text,) = self.render_each([messages], prompt=answer_follows, **options)
        except Refused as error:
            where = f" ({self.path})" if self.path else ""
            raise UserError(f"the model's chat template rejects this conversation: {error}{where}") from None
        return text

    def render_each(
        self,
        conversations: Sequence[Sequence[dict[str, Any]]],
        *,
        tools: list[Any] | None = None,
        prompt: bool,
        **options: Any,
    ) -> list[str]:
        """The text of each conversation. prompt: with the beginning of the answer that follows. Raises Refused."""
        return self._safely(conversations, tools=tools, prompt=prompt, **options)[0]

    def render_marked(
        self, messages: Sequence[dict[str, Any]], *, tools: list[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of ``messages``, and from where to where in it the model writes. Raises Refused."""
        texts, marks = self._safely([messages], tools=tools, prompt=False, return_assistant_tokens_mask=True)
        return texts[0], marks[0]

    def _safely(self, conversations: Sequence[Sequence[dict[str, Any]]], **options: Any) -> tuple[list[str], list[Any]]:
        try:
            with time_limit(_SECONDS):
                return self._render(conversations, **options)
        except Exception as error:  # a template is a program, and what it raises may be of any kind
            raise Refused(_reason(error)) from None

    def _render(
        self, conversations: Sequence[Sequence[dict[str, Any]]], *, prompt: bool, **options: Any
    ) -> tuple[list[str], list[Any]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        return render_jinja_template(  # type: ignore[return-value]
            conversations=[list(messages) for messages in conversations],
            chat_template=self.source,
            add_generation_prompt=prompt,
            **(self._special_tokens | options),
        )


def _reason(error: Exception) -> str:
    """What an exception says, or, of those that do not speak to people, what it is."""
    from jinja2 import TemplateError

    text = cut(str(error).strip(), 500)
    if isinstance(error, TemplateError | OutOfTime) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Refused(ValueError):
    """The chat template does not take a conversation; the message says why."""


def ensure_template(tokenizer: Path) -> bool:
    """Give the tokenizer in a folder ChatML if it has no chat template. Whether it had none.

    Raises UserError if the one that it has cannot be used.
    """
    found = ChatTemplate.find(tokenizer)
    if found is None:
        (tokenizer / TEMPLATE_FILE).write_text(CHATML, encoding="utf-8")
        return True
    found.check()
    return False
