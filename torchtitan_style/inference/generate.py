"""Text from prompts, as it comes."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Generator, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.distributed as dist

from torchtitan_style.common.device import available_memory
from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import readable_bytes
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer
from torchtitan_style.models.spec import ModelConfig

from .cache import KVCache, bytes_per_token
from .decode import Decoder, Speed
from .sampling import Sampler
from .settings import Sampling
from .step import DecodingStep
from .text import TextStream

Finish = Literal["stop", "length", "positions"]
"""Why a text ended: a stop token or string, enough tokens, or no position left in the model."""


_AT_FIRST = 1024
"""New tokens that the cache has room for from the beginning; it grows if there are more."""


@dataclass(frozen=True)
class Piece:
    """Some more text of a row; rows are counted prompt by prompt, the samples of each next to each other."""

    row: int
    text: str
    finish: Finish | None = None
    """Set on the last piece of a row."""
    tokens: int = 0
    """Tokens drawn for this row, with the last piece."""


_MEASURED_AT_ONCE = 2**20
"""Characters of a prompt."""
_MORE_BY_A_CUT = 256


class TextModel:
    """A model with its tokenizer. ``load_model`` makes one.

    >>> model = load_model("outputs/qwen3")
    >>> model.generate("def main(", max_new_tokens=32, temperature=0)
    >>> for text in model.stream("def main("):
    ...     print(text, end="", flush=True)
    """

    def __init__(
        self,
        model: Any,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        assets: Path,
        device: torch.device,
        stop_tokens: set[int],
        sampling: Sampling,
        step: DecodingStep | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model, self.config, self.tokenizer, self.assets = model, config, tokenizer, assets
        self.device, self.step, self.group = device, step, group
        self.stop_tokens = stop_tokens
        """Tokens that end a text."""
        self.sampling = sampling
        """How tokens are chosen where nothing else is said."""

    @overload
    def generate(self, prompt: str, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], **options: Any) -> list[str]: ...
    def generate(self, prompt: str | Sequence[str], **options: Any) -> str | list[str]:
        """What follows ``prompt``, or what follows each of several, computed as one batch.

        options: those of ``pieces``, and any field of ``Sampling``. Several samples of a prompt come after each other.
        Raises UserError for a prompt that is empty or too long, and for settings that have no meaning.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = [""] * len(prompts) * options.get("num_samples", 1)
        for piece in self.pieces(prompts, **options):
            texts[piece.row] += piece.text
        return texts[0] if isinstance(prompt, str) and len(texts) == 1 else texts

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """What follows ``prompt``, in pieces of whole characters as they come."""
        return (piece.text for piece in self.pieces([prompt], **options) if piece.text)

    def pieces(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        num_samples: int = 1,
        seed: int = 0,
        stop: Sequence[str] = (),
        speed: Speed | None = None,
        **sampling: Any,
    ) -> Generator[Piece, None, None]:
        """The texts that follow ``prompts``, all rows at once.

        max_new_tokens: at most, for each row. num_samples: texts per prompt. seed: sample i of any prompt draws from
        (seed, i), whatever else is in the batch. stop: strings that end a text. speed: is added to. sampling:
        fields of ``Sampling``, the model's own where left out.
        """
        rows = [self.encode(prompt) for prompt in prompts]
        self.prepare(len(rows) * num_samples)
        return self.continue_ids(
            rows,
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
            seed=seed,
            stop=stop,
            speed=speed,
            sampling=self.settings(**sampling),
        )

    def settings(self, **changes: Any) -> Sampling:
        """The model's own sampling with ``changes``. Raises UserError if they have no meaning."""
        fields = [field.name for field in dataclasses.fields(Sampling)]
        if unknown := sorted(changes.keys() - set(fields)):
            raise TypeError(_unknown_option(unknown[0], [*_OPTIONS, *fields]))
        sampling = dataclasses.replace(self.sampling, **changes)
        sampling.check()
        return sampling

    def prepare(self, rows: int) -> None:
        """Compile the steps of so many rows, if the model was loaded to be; takes a while the first time."""
        if self.step is not None and rows > 0:
            self.step.prepare(rows)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of ``prompt``. Raises UserError if there are none, too many, or some that the model has not."""
        self._check_length(prompt)
        ids = self.tokenizer.encode(prompt)
        if not ids:
            raise UserError("the prompt is empty; give text to continue, as in --prompt 'def'")
        if len(ids) >= (most := self.config.max_position_embeddings):
            raise UserError(
                f"the prompt has {len(ids):,} tokens, but the model has only {most:,} positions, new tokens included"
            )
        if max(ids) >= self.config.vocab_size:
            raise UserError(
                f"the prompt has token id {max(ids)}, but the model's vocabulary has {self.config.vocab_size} tokens; "
                "the tokenizer belongs to another model"
            )
        return ids

    def _check_length(self, prompt: str) -> None:
        """Raise UserError for a prompt that is certainly too long, piece by piece: tokenizing it as a whole takes 150
        bytes of memory for each of its own."""
        most = self.config.max_position_embeddings
        if len(prompt) <= _MEASURED_AT_ONCE:
            return
        tokens = 0
        for at in range(0, len(prompt), _MEASURED_AT_ONCE):
            # Cut in two, a token becomes some more.
            tokens += max(len(self.tokenizer.encode(prompt[at : at + _MEASURED_AT_ONCE])) - _MORE_BY_A_CUT, 0)
            if tokens >= most:
                raise UserError(
                    f"the prompt has more than {tokens:,} tokens, but the model has only {most:,} positions, new "
                    "tokens included"
                )

    def new_cache(self, rows: Sequence[Sequence[int]] = ((),), *, capacity: int = 256) -> KVCache:
        """An empty cache for ``rows``, which are padded to the longest."""
        longest = max(map(len, rows))
        padding = [longest - len(row) for row in rows]
        return KVCache(self.config.windows, padding=padding, capacity=max(capacity, longest))

    def check_memory(self, rows: Sequence[Sequence[int]], num_samples: int) -> None:
        """Raise UserError if there is no room for the prompts' part of the cache and for one step's logits."""
        ranks = 1 if self.group is None else dist.get_world_size(self.group)
        cached = bytes_per_token(self.config, next(self.model.parameters()).dtype.itemsize) // ranks
        each = cached * max(map(len, rows)) + 4 * self.config.vocab_size
        needed, available = len(rows) * num_samples * each, available_memory(self.device)
        if needed > available:
            raise UserError(
                f"{len(rows) * num_samples:,} texts at once need {readable_bytes(needed)} of memory, but only "
                f"{readable_bytes(available)} are free; lower --batch-size or --num-samples"
            )

    def continue_ids(
        self,
        rows: Sequence[Sequence[int]],
        *,
        sampling: Sampling,
        max_new_tokens: int,
        num_samples: int = 1,
        seed: int = 0,
        stop: Sequence[str] = (),
        stop_tokens: Set[int] = frozenset(),
        speed: Speed | None = None,
        cache: KVCache | None = None,
        cached: list[int] | None = None,
    ) -> Generator[Piece, None, None]:
        """As ``pieces``, for token ids.

        stop_tokens: tokens that end a text beside the model's own.
        cache, cached: of what is before a single row, and the ids of it; both are added to.
        """
        if max_new_tokens < 1 or num_samples < 1:
            name = "max_new_tokens" if max_new_tokens < 1 else "num_samples"
            raise UserError(f"{name}: must be at least 1, not {min(max_new_tokens, num_samples)}")
        if not rows:
            return
        self.check_memory(rows, num_samples)
        prompts = [[*(cached or ()), *row] for row in rows for _ in range(num_samples)]
        ends = self.stop_tokens | stop_tokens
        positions = self.config.max_position_embeddings
        seeds = [f"{seed}/{sample}" for _ in rows for sample in range(num_samples)]
        capacity = min(positions, max(map(len, rows)) + min(max_new_tokens, _AT_FIRST))
        stop = [stop] if isinstance(stop, str) else stop
        decoder = Decoder(
            self.model,
            rows,
            Sampler(sampling, seeds=seeds, prompts=prompts),
            cache=self.new_cache(rows, capacity=capacity) if cache is None else cache,
            device=self.device,
            copies=num_samples,
            step=self.step,
            group=self.group,
        )
        texts = [TextStream(self.tokenizer.decode, stop=stop, before=prompt) for prompt in prompts]
        most = [min(max_new_tokens, positions - len(prompt)) for prompt in prompts]
        drawn = [0] * len(texts)
        try:
            for tokens in decoder:
                going = []
                for row, token in zip(decoder.rows, tokens, strict=True):
                    drawn[row] += 1
                    text = texts[row].push(token) if token not in ends else ""
                    if token in ends or texts[row].stopped:
                        yield Piece(row, text + texts[row].finish(), "stop", drawn[row])
                    elif drawn[row] == most[row]:
                        why: Finish = "length" if drawn[row] == max_new_tokens else "positions"
                        yield Piece(row, text + texts[row].finish(), why, drawn[row])
                    else:
                        going.append(row)
                        yield Piece(row, text)
                decoder.keep(going)
        finally:
            if cached is not None:
                cached += decoder.fed
            if speed is not None:
                speed += decoder.speed


_OPTIONS = [
    name
    for name, parameter in inspect.signature(TextModel.pieces).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
]
"""Options of ``pieces`` that are not fields of ``Sampling``."""


def _unknown_option(name: str, options: list[str]) -> str:
    nearest = difflib.get_close_matches(name, options, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else "."
    return f"there is no option {name}{hint} The options are {', '.join(options)}"
