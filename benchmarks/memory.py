"""Memory of a training step by what is recomputed in the backward pass, and what that costs in time.

    python benchmarks/memory.py                                              # the default model and batch
    python benchmarks/memory.py --model 100M --rows 4 --seq-len 1024 --steps 1 --repeats 3

All are compiled and take turns with the first, as in ``train_step.py``; so does Transformers' model in a bare loop,
with its gradient checkpointing and without. Memory is what a process takes at most beyond the libraries. The state is
in all of them: weights, gradients and AdamW's moments in fp32; what is above it are activations, logits and copies.
"""

from __future__ import annotations

import argparse

import torch
from race import Racer, Turns, machine, parsed, parser_of, race, serve, start, table, write
from train_step import SHAPES, hf, make_config, our_compile, our_step

from torchtitan_style.models.qwen3.config import FLAVORS
from torchtitan_style.models.registry import model_config

CONTENDERS: dict[str, tuple[str, ...]] = {
    "none": ("none",),
    "memory_budget, 0.5": ("memory_budget", "--activation_checkpoint.memory_budget", "0.5"),
    "memory_budget, 0.2": ("memory_budget", "--activation_checkpoint.memory_budget", "0.2"),
    "memory_budget, 0": ("memory_budget", "--activation_checkpoint.memory_budget", "0"),
    "selective, op": ("selective", "--activation_checkpoint.selective_ac_option", "op"),
    "selective, 2": ("selective", "--activation_checkpoint.selective_ac_option", "2"),
    "full": ("full",),
    "HF loop": ("none",),
    "HF loop, gradient checkpointing": ("full",),
}
"""Name → ``activation_checkpoint.mode`` and more of the command line for our config."""


def contend(name: str, arguments: argparse.Namespace, turns: Turns) -> None:
    """Serve a contender's steps. Does not return."""
    arguments.recompute, *given = CONTENDERS[name]
    if name.startswith("HF"):
        hf(arguments, turns, "sdpa", "compiled")
    serve(turns, our_step(arguments, turns.device, *our_compile("block"), *given))


def main() -> None:
    parser = parser_of(__doc__, CONTENDERS, [*FLAVORS, *SHAPES])
    arguments = parsed(parser)
    arguments.recompute = "none"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.serve:
        contend(arguments.serve, arguments, Turns(device))
    state = 16 * model_config(make_config(arguments).model).num_parameters
    racers = race(CONTENDERS, lambda name: begin(name, arguments), arguments)
    about = machine(device)
    report(arguments, racers, about, state)
    write(arguments, about, racers)


def begin(name: str, arguments: argparse.Namespace) -> Racer:
    racer = start(name, __file__, arguments)
    racer.warm_up(3)
    return racer


def report(arguments: argparse.Namespace, racers: list[Racer], about: dict[str, str], state: int) -> None:
    reference = racers[0]
    rows = [
        (
            racer.name,
            f"{racer.memory / 2**20:,.0f}",
            f"{(racer.memory - state) / 2**20:,.0f}",
            f"{racer.memory / reference.memory:.2f}",
            f"{racer.ratio:.2f}",
        )
        for racer in racers
    ]
    print(
        f"\n{arguments.model}, {arguments.rows} rows of {arguments.seq_len}, compiled; {about['device']}, "
        f"torch {about['torch']}; medians of {arguments.repeats} turns of {arguments.steps} steps\n"
    )
    print(table(("", "peak MiB", f"above the state's {state / 2**20:,.0f}", "× memory", "× time"), rows))


if __name__ == "__main__":
    main()
