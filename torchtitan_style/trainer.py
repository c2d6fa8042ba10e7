"""Training, from a checked configuration to a trained model.

Read ``Trainer.run`` first, then ``train_step`` in ``step.py``: the rest is setting up and reporting.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from .checkpoint.checkpointer import Checkpointer
from .checkpoint.saved import open_model
from .checkpoint.weights import load_weights
from .config import Config, to_toml
from .config.layout import plan_batch, plan_layout
from .data.loader import Batch
from .data.tokenizer import Tokenizer
from .distributed import device as devices
from .distributed.garbage import GarbageCollector
from .distributed.world import World, destroy_world, init_world, on_main, set_timeout
from .ending import on_interrupt
from .errors import UserError
from .inference.sample import sample
from .metrics.display import Display
from .metrics.log import StepResult, TrainingLog
from .metrics.profiler import profile_step
from .metrics.throughput import Meter
from .metrics.validation import validate
from .models.qwen3.config import FLAVORS
from .run_data import REPLACEABLE, RunData
from .step import DTYPES, build_model, build_optimizer, mix, train_step

__all__ = ["Trainer", "train"]


@dataclasses.dataclass
class TrainState:
    """All that a resumed run goes on from, beside weights and optimizer state."""

    step: int = 0
    rows_seen: int = 0
    best_val_loss: float | None = None
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Where the data is: what ``Loader.start`` takes."""


def train(config: Config, *, world_size: int) -> None:
    """Train as ``config`` says. Called by every rank."""
    layout = plan_layout(config.parallelism, world_size)
    world = init_world(layout, timeout_seconds=config.comm.init_timeout_seconds)
    try:
        Trainer(config, world).run()
    finally:
        destroy_world()


class Trainer:
    """The parts of a run, and its loop."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.dump_folder = Path(config.job.dump_folder)
        self.display = Display(is_main=world.is_main)
        self.state = TrainState()
        self.batch_plan = plan_batch(config.training, world.layout.dp)
        if config.debug.deterministic:
            devices.use_deterministic_algorithms()
        self._build_data()
        self._build_model()
        self.checkpointer = Checkpointer(
            config.checkpoint,
            self.dump_folder / "checkpoint",
            model=self.model,
            optimizer=self.optimizer,
            settings=to_toml(config, dimensions=True),
            tokenizer=self.data.prepared.tokenizer,
            say=self.display.warn,
        )
        self.warmed_up = False
        self.gc = GarbageCollector(every=config.training.gc_freq)
        on_interrupt(lambda: self.display.say(self._interrupted()))
        flops = self.model_config.flops_per_token(config.training.seq_len)
        self.meter = Meter(world, flops_per_token=flops, dtype=DTYPES[config.training.mixed_precision_param])

    # The loop

    def run(self) -> None:
        """Resume if there is something to resume, and train to the last step."""
        self._resume()
        state, steps = self.state, self.config.training.steps
        if state.step >= steps:
            self.display.say(
                f"{self.dump_folder} is trained to step {state.step} already; raise training.steps to go on, or "
                "start a new run with another --job.dump_folder"
            )
            return
        if state.step:
            on_main(lambda: self.checkpointer.folder.set_aside_after(state.step, self.display.warn))
        self.data.loader.start(state.data)
        self._open_log()
        try:
            if state.step == 0 and self.config.validation.enable:
                self._validate()
                self.meter.restart()
            while state.step < steps:
                state.step += 1
                with profile_step(self.config.profiling, state.step, folder=self.dump_folder, rank=self.world.rank):
                    result = train_step(
                        self.model,
                        self.optimizer,
                        self._next_batch(),
                        step=state.step,
                        config=self.config,
                        world=self.world,
                    )
                self._after_step(result)
        finally:
            self.data.loader.close()
            self.log.close()
        self.display.say(f"done: {steps} steps; everything is in {self.dump_folder}")

    def _next_batch(self) -> Batch:
        with self.meter.waiting_for_data():
            batch = self.data.loader.next()
        self.state.rows_seen += self.batch_plan.global_batch_size
        return batch

    def _after_step(self, result: StepResult) -> None:
        """What may be due after a step: a log line, validation, a checkpoint."""
        config, step = self.config, self.state.step
        self.log.add(step, self.state.rows_seen * config.training.seq_len, result)
        self.gc.step()
        if not self.warmed_up:
            set_timeout(config.comm.train_timeout_seconds)
            self.warmed_up = True
        last = step == config.training.steps
        validates = config.validation.enable and (last or step % config.validation.freq == 0)
        saves = config.checkpoint.enable and (last or step % config.checkpoint.interval == 0)
        if validates or saves:
            self.log.flush()  # stops the run if something is not finite
        best = validates and self._validate()
        if saves or (best and config.checkpoint.enable and config.checkpoint.keep_best):
            self._save(best=best)
        if validates or last:
            self._print_sample()
        if validates or saves:
            self.meter.restart()

    # Validation and text

    def _validate(self) -> bool:
        """Loss on the held-out rows. Whether it is the lowest so far."""
        with self._evaluation():
            figures = validate(self.model, self.data.validation_batches, self.world.dp_group)
        best = self.state.best_val_loss is None or figures["val_loss"] < self.state.best_val_loss
        if best:
            self.state.best_val_loss = figures["val_loss"]
        self.log.validation(self.state.step, figures, best=best and self.state.step > 0)
        return best

    def _print_sample(self) -> None:
        config = self.config.generation
        if not config.enable:
            return
        prompt = self.tokenizer.encode(config.prompt) or [self.tokenizer.end_of_text]
        with self._evaluation():
            ids = sample(
                self.model,
                prompt,
                config,
                end_of_text=self.tokenizer.end_of_text,
                max_length=self.model_config.max_position_embeddings,
                windows=[self.model_config.window(layer) for layer in range(self.model_config.num_hidden_layers)],
                multiple_of=self.world.layout.tp,
                seed=mix(self.config.training.seed, self.state.step),
                device=self.world.device,
            )
        self.display.sample(config.prompt, self.tokenizer.decode(prompt + ids)[len(config.prompt) :])

    @contextlib.contextmanager
    def _evaluation(self) -> Iterator[None]:
        """No dropout, no gradients, and no compiled graphs: other shapes would be compiled anew."""
        self.model.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.model.train()
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # no backward pass does it

    # Setting up

    def _build_data(self) -> None:
        config, world = self.config, self.world
        self.model_config = config.model.qwen3()
        self.data = RunData(config, world, self.display)
        self.tokenizer = Tokenizer(self.data.prepared.tokenizer)

    def _build_model(self) -> None:
        self.model = build_model(self.config, self.world, warn=self.display.warn)
        self.optimizer = build_optimizer(self.model, self.config)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to go on from."""
        shape = dataclasses.asdict(self.model_config)
        for name in ("attention_dropout", "dropout", "initializer_range", "max_position_embeddings"):
            del shape[name]
        training = {"seq_len": self.config.training.seq_len, "seed": self.config.training.seed}
        return {
            "model": shape,
            "training": training,
            "optimizer": {"name": self.config.optimizer.name},
            "data": self.data.identity(),
        }

    def _resume(self) -> None:
        step = self.checkpointer.find()
        if step is None:
            self._start_from_weights()
            return
        saved = on_main(lambda: self.checkpointer.folder.train_state(step))
        now, before = self._identity(), saved["identity"]["optimizer"]
        switch = self.config.checkpoint.switch_optimizer and before != now["optimizer"]
        if switch:
            self.display.warn(f"the optimizer was {before['name']}; {self.config.optimizer.name} starts afresh")
            del saved["identity"]["optimizer"]
        if self.config.checkpoint.allow_changed_data:
            data = saved["identity"]["data"]
            changed = [key for key in REPLACEABLE if data.get(key) != now["data"][key]]
            for key in changed:
                data.pop(key, None)
            if changed:
                self.display.warn(f"{' and '.join(changed)} of the data changed; going on at the same place of the new")
        differences = [
            f"{section}.{key} was {value}, is {now[section].get(key)}"
            for section, values in saved["identity"].items()
            for key, value in values.items()
            if now[section].get(key) != value
        ]
        if differences:
            hint = ", allow it with checkpoint.switch_optimizer" if differences[0].startswith("optimizer.") else ""
            if all(difference.startswith(tuple(f"data.{key} " for key in REPLACEABLE)) for difference in differences):
                hint = ", go on at the same place of the new data with --checkpoint.allow_changed_data"
            raise UserError(
                f"{self.checkpointer.folder.path(step)} is of another run: {'; '.join(differences)}; put it back"
                f"{hint}, or start a new run with another --job.dump_folder"
            )
        self.checkpointer.load(step, optimizer=not switch)
        self.state = TrainState(**saved["state"])

    def _start_from_weights(self) -> None:
        """Read the initial weights, if the run starts from any; each rank its own part."""
        source = self.config.initial_weights
        if not source:
            return

        def verified() -> Path:
            found = open_model(source, verify=True, say=self.display.warn)
            found.check(self.model_config)
            return found.path

        found = open_model(str(on_main(verified)), verify=False)
        load_weights(found, dict(self.model.named_parameters()))
        self.display.say(f"starting from the weights of {source}")
        if found.tokenizer is None and self.config.data.tokenizer == "train":
            self.display.warn(
                f"{source} has no tokenizer: one was trained on the corpus, and its ids mean something else than the "
                "weights have learnt; data.tokenizer names the right one"
            )
        flavor = self.config.model.flavor
        if "flavor" in self.config.model.model_fields_set and FLAVORS[flavor] != self.model_config:
            self.display.warn(f'model.flavor = "{flavor}" does not apply: the dimensions are those of {source}')

    def _save(self, *, best: bool) -> None:
        self.state.data = self.data.loader.gather_state(self.world.dp_group)
        train_state = {
            "state": dataclasses.asdict(self.state),
            "identity": self._identity(),
            "mesh": dataclasses.asdict(self.world.layout),
            "torch": torch.__version__,
        }
        self.checkpointer.save(self.state.step, train_state, best=best)

    # Reporting

    def _open_log(self) -> None:
        config, layout, plan = self.config, self.world.layout, self.batch_plan
        if self.world.is_main:
            (self.dump_folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
        total, seq_len = config.training.steps, config.training.seq_len
        processes = f"{layout.world_size} × " if layout.world_size > 1 else ""
        self.display.say(
            f"{config.model.name} {config.initial_weights or config.model.flavor}, "
            f"{self.model_config.num_parameters / 1e6:,.1f} M parameters, "
            f"{config.training.mixed_precision_param}, on {processes}{devices.name(self.world.device)}"
            + (f" ({layout})" if processes else "")
        )
        microbatches = f" in {plan.accumulation_steps} microbatches" if plan.accumulation_steps > 1 else ""
        self.display.say(
            f"{total} steps of {plan.global_batch_size} rows of {seq_len} tokens{microbatches}, "
            f"{self.data.describe()}, into {self.dump_folder}"
        )
        if self.state.step:
            self.display.say(f"resuming after step {self.state.step}{self.data.resuming(self.state.data)}")
        self.log = TrainingLog(
            config.metrics,
            self.world,
            self.display,
            self.dump_folder,
            first_step=self.state.step,
            last_step=total,
            tokens_per_step=plan.global_batch_size * seq_len,
            meter=self.meter,
            settings=config.model_dump(),
            corpora=self.data.mixture,
            report_padding=config.data.packing == "best_fit",
            on_problems=self.data.report_problems,
        )

    def _interrupted(self) -> str:
        """What to tell a person who has interrupted the run."""
        steps = self.checkpointer.folder.steps()
        if not steps:
            return f"interrupted at step {self.state.step}. There is no checkpoint yet."
        return (
            f"interrupted at step {self.state.step}. The last checkpoint is {self.checkpointer.folder.path(steps[0])}. "
            "The same command goes on from there."
        )
