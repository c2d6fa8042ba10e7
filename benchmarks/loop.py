"""What training costs beside its training steps, and what a step costs beside its computation.

    python benchmarks/loop.py [--json loop.json] [--section.key VALUE ...]
    python benchmarks/loop.py --training.steps 50 --validation.freq 50     # shorter

1. Where the time of a whole run goes, from the end of its first step on: each second counts for the innermost of the
   parts below that it is spent in. The loop's own are all but the training step's computation, validation, samples
   and checkpoints: they are work that was asked for. What the guard does is done inside of the training step and
   counts for the loop.
2. The wall time of an uncompiled step of models with next to no computation (32 wide, one row of 8 tokens), by the
   number of layers: Python, dispatch, and the bare minimum of kernels. Beside it, in turns, the loop that people
   write by hand: the same model under autocast, ``clip_grad_norm_`` and fused AdamW.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from race import machine, table
from train_step import step_on

from torchtitan_style.config import Config
from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import plan_layout
from torchtitan_style.data.loader import Loader
from torchtitan_style.distributed.world import World, init_world
from torchtitan_style.launch.configure import load_config
from torchtitan_style.metrics.log import TrainingLog
from torchtitan_style.models.qwen3.model import Qwen3ForCausalLM
from torchtitan_style.models.registry import model_config
from torchtitan_style.optim.guard import StepGuard
from torchtitan_style.train import trainer
from torchtitan_style.train.garbage import GarbageCollector
from torchtitan_style.train.observer import Observer, observe
from torchtitan_style.train.policy import StepPolicy
from torchtitan_style.train.stopping import ending_at_once, interruptible

STEP = "training steps"
ASKED_FOR = ("validation", "samples of text", "checkpoints")
REST = "the rest of the loop"
PARTS = {
    STEP: ((trainer, "train_step"),),
    "validation": ((trainer.Trainer, "_validate"),),
    "samples of text": ((trainer.Trainer, "_print_sample"),),
    "checkpoints": ((trainer.Trainer, "_save"),),
    "reading the rows": ((Loader, "next"),),
    "metrics and console": (
        (TrainingLog, "add"),
        (TrainingLog, "flush"),
        (StepPolicy, "review"),
        (TrainingLog, "validation"),
    ),
    "guard": ((StepGuard, "admits"),),
    "garbage collection": ((GarbageCollector, "step"),),
    "asking whether to stop": ((trainer.Trainer, "_stop_requested"),),
}
"""What is timed, by the name in the table."""

LAYERS = (8, 16, 32, 64)


class Clock:
    """Adds up the time of functions, without that of other timed ones that they call."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*PARTS, REST), 0.0)
        self._stack, self._last = [REST], time.perf_counter()

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            self._count()
            self._stack.append(name)
            try:
                return function(*arguments, **named)
            finally:
                self._count()
                self._stack.pop()

        setattr(owner, attribute, timed)

    def restart(self) -> None:
        self._count()
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    def stop(self) -> None:
        self._count()

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now


def run(config: Config, world: World) -> dict[str, float]:
    """Seconds of each part of a run, from the end of its first step on."""
    clock = Clock()
    for name, functions in PARTS.items():
        for owner, attribute in functions:
            clock.wrap(owner, attribute, name)

    class Restarting(Observer):
        def before_step(self, step: int) -> None:
            if step == 2:
                clock.restart()

    observe(Restarting())
    trainer.Trainer(config, world).run()
    clock.stop()
    return clock.seconds


def tiny_steps(layers: int, world: World) -> dict[str, Callable[[], None]]:
    """A training step, ours and one written by hand, of a model that computes next to nothing."""
    shape = {
        "model.flavor": "debug", "model.num_hidden_layers": layers, "model.max_window_layers": layers,
        "model.hidden_size": 32, "model.intermediate_size": 32, "model.num_attention_heads": 2,
        "model.num_key_value_heads": 1, "model.head_dim": 16, "model.vocab_size": 512,
        "training.seq_len": 8, "training.global_batch_size": 1,
    }  # fmt: skip
    config = load_config(DEFAULT_CONFIG, [text for k, v in shape.items() for text in (f"--{k}", str(v))])
    ids = torch.randint(0, 512, (1, 9), device=world.device)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    bare = Qwen3ForCausalLM(model_config(config.model)).to(world.device)
    adamw = torch.optim.AdamW(bare.parameters(), lr=1e-3, fused=True)

    def by_hand() -> None:
        adamw.zero_grad()
        with torch.autocast(world.device.type, torch.bfloat16):
            loss, _ = bare(inputs, labels)
        (loss / 8).backward()
        torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        adamw.step()

    return {"ours": step_on(ids, config, world), "by hand": by_hand}


def tiny_seconds(world: World, repeats: int) -> dict[int, dict[str, float]]:
    """Seconds of a step by number of layers and contender: medians of ``repeats`` alternating ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # there is nothing to share out, and waiting for each other would be what is measured
    found = {}
    for layers in LAYERS:
        GarbageCollector(every=1)  # off, as in training
        steps = tiny_steps(layers, world)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(repeats + 3):
            for name, step in steps.items():
                begin = time.perf_counter()
                step()
                if world.device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat >= 3:  # the first ones warm up
                    seconds[name].append(time.perf_counter() - begin)
        found[layers] = {name: statistics.median(times) for name, times in seconds.items()}
    torch.set_num_threads(threads)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="steps of the models without computation")
    parser.add_argument("--only", choices=("run", "layers"), help="one of the two parts")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options, arguments = parser.parse_known_args()  # what is left is for the configuration
    figures: dict[str, Any] = {}
    with ending_at_once(), tempfile.TemporaryDirectory() as folder:
        config = load_config(DEFAULT_CONFIG, ["--job.dump_folder", folder, *arguments])
        world = init_world(plan_layout(config.parallelism, 1), timeout_seconds=600)
        about = figures["machine"] = machine(world.device.type)
        if options.only != "run":
            layers = figures["layers"] = tiny_seconds(world, options.repeats)
        if options.only != "layers":
            with interruptible(Path(folder)):
                seconds = figures["run"] = run(config, world)
        print(f"\n{about['device']}, Python {about['python']}, torch {about['torch']}")
        if "run" in figures:
            report_run(config, seconds)
        if "layers" in figures:
            report_layers(layers)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=2) + "\n")


def report_run(config: Config, seconds: dict[str, float]) -> None:
    total = sum(seconds.values())
    own = sum(time for name, time in seconds.items() if name not in (STEP, *ASKED_FOR))
    training = total - sum(seconds[name] for name in ASKED_FOR)
    rows = [(name, f"{time:.3f}", f"{time / total:.2%}") for name, time in seconds.items()]
    print(f"\na run of {config.training.steps} steps, after its first one\n")
    print(table(("", "seconds", "of the run"), [*rows, ("all", f"{total:.3f}", "")]))
    print(
        f"\nthe loop's own: {own / (config.training.steps - 1) * 1e3:.2f} ms a step, {own / training:.2%} of the time "
        "of training (goal: 1%)"
    )


def report_layers(found: dict[int, dict[str, float]]) -> None:
    names = list(found[LAYERS[0]])
    rows = [(str(layers), *(f"{found[layers][name] * 1e3:.2f}" for name in names)) for layers in found]
    fewest, most = LAYERS[0], LAYERS[-1]
    each = [(found[most][name] - found[fewest][name]) / (most - fewest) for name in names]
    print("\nan uncompiled step of a model without computation, on one thread, ms\n")
    print(table(("layers", *names), [*rows, ("each layer more", *(f"{seconds * 1e3:.3f}" for seconds in each))]))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
