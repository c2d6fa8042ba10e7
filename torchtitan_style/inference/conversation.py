"""A conversation with a model: turns, the chat template, and a cache that is kept from turn to turn."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator

from torchtitan_style.common.errors import UserError
from torchtitan_style.data.chat.template import ChatTemplate
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer

from .decode import Speed
from .generate import Finish, TextModel
from .settings import Sampling
from .text import overlap

THINK, END_THINK = "<think>", "</think>"
"""What Qwen3 puts around its thoughts."""


class Conversation:
    """Turns with a model. Without a template the model goes on from all text so far: a base model knows no turns.

    thinking: whether the model thinks before it answers; None: as the template has it. system: the first message.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        template: ChatTemplate | None,
        thinking: bool | None = None,
        system: str | None = None,
    ) -> None:
        self.model, self.template, self.thinking, self.system = model, template, thinking, system
        self.speed = Speed()
        """Of the last answer."""
        self.finish: Finish | None = None
        """Why the last answer ended; None: it was interrupted."""
        end = template.end_of_turn(system=system) if template else ""
        self._stop, self._stop_tokens = split_at_special_token(end, model.tokenizer)
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self._forget()

    def _forget(self) -> None:
        self._cache, self._cached = self.model.new_cache(), list[int]()

    def ask(
        self, text: str, *, sampling: Sampling, max_new_tokens: int, seed: int = 0
    ) -> Generator[tuple[str, bool], None, None]:
        """Yields the answer to ``text`` as it comes, in pieces, and for each whether it is a thought.

        Closing the iterator stops the answer; what there is of it stays in the conversation. Raises UserError, with
        the conversation as it was, if the model has no positions left for an answer.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._render(messages)
        ids = self._encode(prompt)
        known = self._common_prefix(ids)
        before, self.messages, self.speed, self.finish = self.messages, messages, Speed(), None
        # Some templates begin the thought themselves.
        answer, thoughts = "", _Thoughts(thinking=self.template is not None and prompt.rstrip().endswith(THINK))
        pieces = self.model.continue_ids(
            [ids[known:]],
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            seed=seed,
            stop=self._stop,
            stop_tokens=self._stop_tokens,
            speed=self.speed,
            cache=self._cache,
            cached=self._cached,
        )
        done = refused = False
        try:
            for piece in pieces:
                answer += piece.text
                self.finish = piece.finish
                yield from thoughts.split(piece.text, last=piece.finish is not None)
            done = True
        except UserError:
            refused = True
            raise
        finally:
            pieces.close()  # brings the cached ids up to date
            self.messages = before if refused else [*messages, {"role": "assistant", "content": answer}]
            # An interrupted forward pass has written beyond the length, and in a window over what was there.
            lost = not done and any(self._cache.windows)
            if lost or self._cache.truncate(len(self._cached)) < len(self._cached):
                self._forget()

    def transcript(self) -> str:
        """All that was said, to read."""
        if self.template is None:
            return _plain(self.messages)
        return "\n".join(f"{message['role']}: {message['content'].strip()}\n" for message in self.messages)

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self.template.render(messages, thinking=self.thinking) if self.template else _plain(messages)

    def _encode(self, text: str) -> list[int]:
        tokens, positions = len(self.model.tokenizer.encode(text)), self.model.config.max_position_embeddings
        if self.messages and tokens >= positions:
            raise UserError(
                f"the conversation has {tokens:,} tokens, but the model has only {positions:,} positions; "
                "/save FILE saves it, /reset starts a new one"
            )
        return self.model.encode(text)

    def _common_prefix(self, ids: list[int]) -> int:
        """How many of ``ids`` the cache has; the rest is forgotten, and at least one is left to compute."""
        pairs = zip(ids, self._cached, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        known = self._cache.truncate(min(same, len(ids) - 1))
        del self._cached[known:]
        return known


def split_at_special_token(end: str, tokenizer: Tokenizer) -> tuple[list[str], set[int]]:
    """The stop strings and the stop tokens that ``end`` of a turn, as text, stands for.

    A special token ends an answer as a token, as it is not part of the decoded text; text ends it as a stop string.
    """
    ids = tokenizer.encode(end)
    at = next((i for i, token in enumerate(ids) if tokenizer.is_special(token)), len(ids))
    text = end if at == len(ids) else end.partition(tokenizer.token(ids[at]))[0]
    return [text.rstrip()] if text.strip() else [], set(ids[at : at + 1])


def _plain(messages: list[dict[str, str]]) -> str:
    return "".join(message["content"] for message in messages)


class _Thoughts:
    """Splits an answer into thoughts and the rest, piece by piece, without the marks around them."""

    def __init__(self, *, thinking: bool = False) -> None:
        self._held, self._thinking = "", thinking

    def split(self, text: str, *, last: bool) -> Iterator[tuple[str, bool]]:
        text, self._held = self._held + text, ""
        while text:
            mark = END_THINK if self._thinking else THINK
            before, found, text = text.partition(mark)
            if not found:
                keep = 0 if last else overlap(before, [mark])
                before, self._held = before[: len(before) - keep], before[len(before) - keep :]
            if before:
                yield before, self._thinking
            if found:
                self._thinking = not self._thinking
