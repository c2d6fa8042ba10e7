"""``generate``: text that goes on from prompts.

python -m torchtitan_style generate --checkpoint outputs/qwen3 --prompt "def main("
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.program import environment_number
from torchtitan_style.common.reading import read_text
from torchtitan_style.common.reporting import reported_errors
from torchtitan_style.config.layout import Layout
from torchtitan_style.launch.preflight import check_torch
from torchtitan_style.train.stopping import ending_at_once

from .cli import Arguments
from .screen import Screen
from .text_options import TEXT_OPTIONS, add_text_options, check_text_options, compile_steps, load, sampling_of

if TYPE_CHECKING:
    from torchtitan_style.distributed.world import World
    from torchtitan_style.inference.generate import Speed, TextModel

USAGE = f"""\
usage: python -m torchtitan_style generate --checkpoint DIR --prompt TEXT [...]
       torchrun --nproc-per-node N -m torchtitan_style generate [...]      a model split over N devices

Print what the model writes after each prompt, as it comes.

  --checkpoint DIR         a run (its newest verified checkpoint), one checkpoint, or a model folder
  --prompt TEXT            may be given several times; left out, or -: the prompt is standard input
  --prompts-file FILE      a prompt per line; -: of standard input
  --num-samples N          texts per prompt; 1 if left out
  --batch-size N           prompts that are computed at once; 8 if left out
  --max-new-tokens N       128 if left out
  --stop TEXT              ends the text, and is left out of it; may be given several times
  --json                   a JSON object per text, one a line (docs/generation.md)
{TEXT_OPTIONS}

Speed and seed are reported on standard error.
"""


_MOST_BYTES = 2**28
"""Of all prompts together."""


def main(arguments: list[str]) -> None:
    ranks = environment_number("WORLD_SIZE", 1)
    with ending_at_once() if ranks > 1 else contextlib.nullcontext(), reported_errors():
        options = _parse(arguments)
        if ranks > 1 and options.device:
            raise UserError("--device: does not apply under torchrun, where each process has a device of its own")
        if ranks > 1 and options.compile:
            raise UserError("--compile: does not apply to a model that is split over processes; leave it out")
        check_torch()
        world = _join(ranks) if ranks > 1 else None
        prompts = _prompts(options, world)
        _generate(load(options, world=world), prompts, options, quiet=world is not None and not world.is_main)
        if world is not None:
            from torchtitan_style.distributed.world import destroy_world

            destroy_world()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Arguments(USAGE)
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--prompts-file")
    parser.add_argument("--num-samples", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--stop", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    add_text_options(parser, max_new_tokens=128)
    options = parser.parse(arguments)
    check_text_options(options)
    for name in ("num_samples", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, not {getattr(options, name)}")
    if "" in options.prompt:
        raise UserError("--prompt: is empty; give text to continue, as in --prompt 'def'")
    if "" in options.stop:
        raise UserError("--stop: is empty; it would end every text at once")
    for stop in options.stop:
        if stop.encode("utf-8", "replace").decode() != stop:
            raise UserError("--stop: is not UTF-8 text")
    if options.prompt and options.prompts_file:
        raise UserError("--prompt and --prompts-file: give one of them")
    return options


def _join(ranks: int) -> World:
    from torchtitan_style.distributed.world import init_world

    return init_world(Layout(tp=ranks), timeout_seconds=600)


def _prompts(options: argparse.Namespace, world: World | None) -> list[str]:
    """The prompts; of several ranks the first one reads them."""
    if world is None:
        return _read_prompts(options)
    from torchtitan_style.distributed.world import on_main

    return on_main(lambda: _read_prompts(options))


def _read_prompts(options: argparse.Namespace) -> list[str]:
    """Raises UserError if there are none."""
    if options.prompts_file:
        lines = _read(options.prompts_file).split("\n")  # and not at a form feed, or what else is a line to Python
        if prompts := [line.removesuffix("\r") for line in lines if line.strip()]:
            return prompts
        raise UserError(f"--prompts-file {options.prompts_file}: has no prompts; write one per line")
    prompts = [_read("-") if prompt == "-" else prompt for prompt in options.prompt or ["-"]]
    if "" in prompts:
        raise UserError("the prompt is empty; give text to continue, as in --prompt 'def'")
    return prompts


def _read(name: str) -> str:
    try:
        if name != "-":
            return read_text(name, most=_MOST_BYTES)
        if sys.stdin.isatty():
            print("reading the prompt from standard input; Ctrl-D on an empty line ends it", file=sys.stderr)
        content = sys.stdin.buffer.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        return content.decode("utf-8-sig").removesuffix("\n")
    except (OSError, ValueError) as error:
        where = "standard input" if name == "-" else f"--prompts-file {name}"
        why = (
            f"not UTF-8 text: {error}"
            if isinstance(error, UnicodeDecodeError)
            else getattr(error, "strerror", None) or error
        )
        raise UserError(f"{where}: cannot be read: {why}") from None


def _generate(model: TextModel, prompts: list[str], options: argparse.Namespace, *, quiet: bool) -> None:
    from torchtitan_style.inference.generate import Speed

    ids = [model.encode(prompt) for prompt in prompts]  # all are checked before the first is answered
    sampling = model.settings(**sampling_of(options))
    show: Any = (
        _Quiet() if quiet else _Json(options.seed) if options.json else _Text(len(prompts) * options.num_samples)
    )
    total = Speed()
    batches = [range(len(prompts))[i : i + options.batch_size] for i in range(0, len(prompts), options.batch_size)]
    for batch in batches:
        model.check_memory([ids[i] for i in batch], options.num_samples)
    compile_steps(model, len(batches[0]) * options.num_samples)
    for batch in batches:
        speed = Speed()
        show.begin([(prompts[i], len(ids[i]), s) for i in batch for s in range(options.num_samples)])
        for piece in model.continue_ids(
            [ids[i] for i in batch],
            sampling=sampling,
            max_new_tokens=options.max_new_tokens,
            num_samples=options.num_samples,
            seed=options.seed,
            stop=options.stop,
            speed=speed,
        ):
            show.piece(piece)
        show.end(speed)
        total += speed
    if not quiet:
        print(f"{total}; seed {options.seed}", file=sys.stderr)


class _Quiet:
    """What ranks show that are not the first: nothing."""

    def begin(self, rows: list[tuple[str, int, int]]) -> None: ...
    def piece(self, piece: Any) -> None: ...
    def end(self, speed: Speed) -> None: ...


class _Text:
    """Prompts and what follows, row by row: the first that is not finished is shown as it comes."""

    def __init__(self, total: int) -> None:
        self._screen = Screen()
        self._total, self._shown = total, 0

    def begin(self, rows: list[tuple[str, int, int]]) -> None:
        self._prompts = [prompt for prompt, _, _ in rows]
        self._waiting = [""] * len(rows)
        self._finished = [False] * len(rows)
        self._row = 0
        self._heading()

    def _heading(self) -> None:
        self._shown += 1
        if self._total > 1:
            self._screen.write(f"--- {self._shown} of {self._total} ---\n", style="dim")
        self._screen.write(self._prompts[self._row], style="bold")

    def piece(self, piece: Any) -> None:
        self._waiting[piece.row] += piece.text
        self._finished[piece.row] = piece.finish is not None
        while self._row < len(self._waiting):
            text, self._waiting[self._row] = self._waiting[self._row], ""
            self._screen.write(text)
            if not self._finished[self._row]:
                return
            self._screen.write("\n")
            self._row += 1
            if self._row < len(self._waiting):
                self._heading()

    def end(self, speed: Speed) -> None: ...


class _Json:
    """One object a line, for each text when its batch is done."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def begin(self, rows: list[tuple[str, int, int]]) -> None:
        self._records: list[dict[str, Any]] = [
            {"prompt": prompt, "text": "", "sample": sample, "seed": self._seed, "prompt_tokens": tokens}
            for prompt, tokens, sample in rows
        ]

    def piece(self, piece: Any) -> None:
        record = self._records[piece.row]
        record["text"] += piece.text
        if piece.finish is not None:
            record |= {"new_tokens": piece.tokens, "finish": piece.finish}

    def end(self, speed: Speed) -> None:
        rates = {
            "prefill_tokens_per_second": round(speed.prefill, 1),
            "decode_tokens_per_second": round(speed.decode, 1),
        }
        for record in self._records:
            print(json.dumps(record | rates, ensure_ascii=False), flush=True)
