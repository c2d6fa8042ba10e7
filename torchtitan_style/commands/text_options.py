"""Options that ``generate`` and ``chat`` share, checked before torch is imported."""

from __future__ import annotations

import argparse
import random
from typing import TYPE_CHECKING, Any

from torchtitan_style.common.errors import UserError

from .cli import Arguments

if TYPE_CHECKING:
    from torchtitan_style.distributed.world import World
    from torchtitan_style.inference.generate import TextModel

TEXT_OPTIONS = """\
  --temperature T          logits are divided by it; 0: always the most likely token
  --top-k K                draw from the k most likely tokens; 0: all
  --top-p P                draw from the most likely tokens that together have this probability; 1: all
  --min-p P                draw from tokens with at least this share of the top probability; 0: all
  --repetition-penalty R   above 1: tokens that are in the text become less likely
                           left out: what generation_config.json recommends, else 0.7, 40, 1, 0, 1
  --seed S                 the same seed, the same text; left out: another one each time
  --dtype TYPE             bfloat16 or float32; left out: bfloat16 where the hardware computes in it
  --device DEVICE          cpu, cuda, cuda:1; left out: a GPU if there is one
  --compile                compile the steps: a wait at the start, then faster; needs a C++ compiler"""

_SAMPLING: dict[str, type] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
}


def add_text_options(parser: Arguments, *, max_new_tokens: int) -> None:
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    for name, kind in _SAMPLING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--device")
    parser.add_argument("--compile", action="store_true")


def check_text_options(options: argparse.Namespace) -> None:
    """Raise UserError for values that have no meaning, and draw a seed if there is none."""
    from torchtitan_style.inference.settings import Sampling

    Sampling(**sampling_of(options)).check("--")
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: must be at least 1, not {options.max_new_tokens}")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(2**31)


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of ``Sampling`` that are given."""
    return {name: value for name in _SAMPLING if (value := getattr(options, name)) is not None}


def compile_steps(model: TextModel, rows: int) -> None:
    """Compile what decoding so many rows needs, if that was asked for, and say that it takes a while."""
    import sys

    if model.step is not None and not model.step.ready(rows):
        print("compiling the steps of decoding, which takes a while", file=sys.stderr, flush=True)
        model.prepare(rows)


def load(options: argparse.Namespace, *, world: World | None = None) -> TextModel:
    """The model that ``--checkpoint`` names."""
    import sys

    import torch

    from torchtitan_style.inference.load import load_model

    return load_model(
        options.checkpoint,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        device=options.device,
        compile=options.compile,
        world=world,
        say=lambda line: print(line, file=sys.stderr),
    )
