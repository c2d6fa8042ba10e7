"""Training, from a checked configuration to a trained model.

Read ``Trainer.run`` first, then ``train_step`` in ``step.py``: the rest is setting up and reporting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchtitan_style.checkpoint.checkpointer import Checkpointer
from torchtitan_style.checkpoint.manifest import read_manifest
from torchtitan_style.checkpoint.saved import open_model
from torchtitan_style.checkpoint.weights import load_weights
from torchtitan_style.common import device as devices
from torchtitan_style.common.errors import RunError, UserError
from torchtitan_style.common.signals import shielding_children
from torchtitan_style.config import Config, to_toml
from torchtitan_style.config.layout import plan_batch, plan_layout
from torchtitan_style.cpu.half_precision import multiply_in_fp32
from torchtitan_style.data.tokenizer import Tokenizer
from torchtitan_style.distributed.world import World, destroy_world, init_world, on_main, set_timeout
from torchtitan_style.inference.sample import sample
from torchtitan_style.launch.run_lock import run_lock
from torchtitan_style.metrics.display import Display
from torchtitan_style.metrics.experts import ExpertUse
from torchtitan_style.metrics.log import StepResult, TrainingLog
from torchtitan_style.metrics.profiler import profile_step
from torchtitan_style.metrics.throughput import Meter
from torchtitan_style.metrics.validation import validate
from torchtitan_style.models.registry import model_config, spec_of
from torchtitan_style.optim.guard import StepGuard

from .agreement import Agreement
from .data import RunData
from .garbage import GarbageCollector
from .identity import Identity, changed_settings, check_same_run, identity
from .preempted import clear_preempted, write_preempted
from .state import TrainState
from .step import DTYPES, build_optimizer, build_training_model, evaluating, mix, train_step
from .stopping import on_interrupt, stop_gracefully, told_to_stop
from .watchdog import Watchdog

__all__ = ["Trainer", "train"]


def train(config: Config, *, world_size: int) -> None:
    """Train as ``config`` says. Called by every rank."""
    layout = plan_layout(config.parallelism, world_size)
    world = init_world(layout, timeout_seconds=config.comm.init_timeout_seconds)
    with contextlib.ExitStack() as stack:
        on_main(lambda: stack.enter_context(run_lock(Path(config.job.dump_folder))))
        Trainer(config, world).run()
    destroy_world()  # not after an error: NCCL would wait for collectives that the others will not join


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
        stop_gracefully()
        self.agreement = Agreement()
        self.watchdog = Watchdog(
            self.dump_folder / "hang", limit=config.comm.init_timeout_seconds, warn=self.display.warn
        )
        self._build_model()
        self._build_checkpointer()
        self.is_warm = False
        self.told_to_stop = 0
        """The signal that the ranks have agreed to stop for."""
        self.gc = GarbageCollector(every=config.training.gc_freq)
        on_interrupt(lambda: self.display.say(self._interrupted()))
        flops = self.model_config.flops_per_token(config.training.seq_len)
        self.meter = Meter(world, flops_per_token=flops, dtype=DTYPES[config.training.mixed_precision_param])

    # The loop

    def run(self) -> None:
        """Resume if there is something to resume, and train to the last step, or until told to stop."""
        self._resume()
        state, steps = self.state, self.config.training.steps
        if state.step >= steps and not self._validation_is_due():
            self.display.say(
                f"{self.dump_folder} is trained to step {state.step} already; raise training.steps to go on, or "
                "start a new run with another --job.dump_folder"
            )
            return
        if state.step:
            on_main(lambda: self.checkpointer.folder.set_aside_after(state.step, self.display.warn))
        with shielding_children():
            self.data.loader.start(state.data)
        self._open_log()
        try:
            self._stopping()  # a signal may have come meanwhile
            self._catch_up_on_validation()
            while state.step < steps and not self._stopping():
                state.step += 1
                with profile_step(self.config.profiling, state.step, folder=self.dump_folder, rank=self.world.rank):
                    result = self._train_step()
                self._after_step(result)
            self.log.flush()
            finished = state.step >= steps and not self._validation_is_due()
            if not finished:
                self._leave()
            self.checkpointer.close()
        except (RunError, UserError):
            self.checkpointer.wait()
            raise
        finally:
            self.data.loader.close()
            self.log.close()
            self.watchdog.close()
        if finished:
            self.display.say(f"done: {state.step} steps; everything is in {self.dump_folder}")

    def _train_step(self) -> StepResult:
        with self.meter.waiting_for_data():
            batch = self.data.loader.next()
        self.state.rows_seen += self.batch_plan.global_batch_size
        # The first step is compiled, by processes of their own.
        with contextlib.nullcontext() if self.is_warm else shielding_children():
            return train_step(
                self.model,
                self.optimizer,
                batch,
                step=self.state.step,
                config=self.config,
                world=self.world,
                guard=self.guard,
            )

    def _after_step(self, result: StepResult) -> None:
        """What may be due after a step: a log line, validation, a checkpoint."""
        config, step = self.config, self.state.step
        self.watchdog.beat(step)
        self.log.add(step, self.state.rows_seen * config.training.seq_len, result)
        self.gc.step()
        if not self.is_warm:
            set_timeout(config.comm.train_timeout_seconds)
            self.watchdog.limit = config.comm.train_timeout_seconds
            self.is_warm = True
        last = step == config.training.steps
        validates = self._validation_is_due()
        saves = config.checkpoint.enable and (last or step % config.checkpoint.interval == 0)
        if validates or saves:
            self.log.flush()  # stops the run if too many steps were skipped
        if step > self.state.furthest_step:
            self.state.rewinds = 0
        if self.log.spiked and self._rewind():
            return
        best = validates and self._validate() and config.checkpoint.keep_best
        if saves or (best and config.checkpoint.enable):
            self._save(best=best)
        if (validates or last) and not self.told_to_stop:
            self._print_sample()
        if validates or saves:
            self.meter.restart()

    def _stopping(self) -> bool:
        """Whether all ranks are to stop now, as one of them was told to. Asked by all equally often."""
        if not self.told_to_stop:
            self.told_to_stop, busy = self.agreement.exchange(told_to_stop(), self.checkpointer.is_busy)
            self.checkpointer.settle(busy=bool(busy))
            self.watchdog.beat()
        return bool(self.told_to_stop)

    def _leave(self) -> None:
        """Save, and leave word that the run stopped before its end, so that a scheduler can start it again."""
        step, folder = self.state.step, self.checkpointer.folder
        self.checkpointer.finish()
        if self.config.checkpoint.enable and step and self.checkpointer.saved_step != step:
            self._save(best=False)
        self.checkpointer.close()
        saved = str(folder.path(step)) if self.checkpointer.saved_step == step else None
        name = signal.Signals(self.told_to_stop).name
        on_main(lambda: write_preempted(self.dump_folder, step=step, checkpoint=saved, signal=name))
        where = f"; the checkpoint is {saved}" if saved else ""
        self.display.say(f"stopped at step {step}, as told{where}. The same command goes on from there.")

    def _rewind(self) -> bool:
        """After a spike, if so configured, go back to the newest checkpoint, and on with the data that comes next."""
        self.log.spiked = False
        state, checkpointer = self.state, self.checkpointer
        if self.config.training.spike_action != "rewind":
            return False
        checkpointer.finish()
        found = checkpointer.find(-1)
        if found is None:
            if state.skipped.in_a_row > self.config.training.max_skipped_steps:
                raise RunError(
                    f"{state.skipped.in_a_row} steps in a row were skipped (training.max_skipped_steps), and there is "
                    "no checkpoint yet to rewind to"
                )
            self.display.warn("there is no checkpoint yet to rewind to")
            return False
        state.furthest_step = max(state.furthest_step, state.step)
        state.rewinds += 1
        if state.rewinds > self.config.training.max_skipped_steps:
            raise RunError(
                f"rewound {state.rewinds - 1} times without getting past step {state.furthest_step} "
                "(training.max_skipped_steps); a lower optimizer.lr or training.max_norm may help"
            )
        self.display.warn(f"going back to step {found}, and on with the data after step {state.step}")
        saved, saved_identity = self._read_state(found)
        state.go_back_to(saved)
        self._restore(found, saved_identity)
        checkpointer.saved_step = None  # the data is further than it says
        on_main(lambda: checkpointer.folder.set_aside_after(found, self.display.warn))
        self.log.close()
        self._open_log()
        return True

    # Validation and text

    def _validation_is_due(self) -> bool:
        """Whether the present step is to be validated and was not."""
        step, config = self.state.step, self.config.validation
        return (
            config.enable
            and self.state.validated_step != step
            and (step % config.freq == 0 or step == self.config.training.steps)
        )

    def _catch_up_on_validation(self) -> None:
        """Validate before the first step, and on a resume if the run was stopped before it had."""
        if self._validation_is_due():
            best = self._validate()
            done = not self._validation_is_due()  # and not told to stop meanwhile
            if done and self.state.step and self.config.checkpoint.enable:  # else the next start would do it again
                self._save(best=best and self.config.checkpoint.keep_best)
            self.meter.restart()

    def _validate(self) -> bool:
        """Loss on the held-out rows. Whether it is the lowest so far."""
        with evaluating(self.model):
            figures = validate(self.model, self.data.validation_batches, self.world.batch_group, stop=self._stopping)
        if figures is None:
            return False
        loss, lowest = figures["val_loss"], self.state.best_val_loss
        best = math.isfinite(loss) and (lowest is None or loss < lowest)
        if best:
            self.state.best_val_loss = loss
        self.state.validated_step = self.state.step
        self.log.validation(self.state.step, figures, best=best and self.state.step > 0)
        return best

    def _print_sample(self) -> None:
        config = self.config.generation
        if not config.enable:
            return
        prompt = self.tokenizer.encode(config.prompt) or [self.tokenizer.end_of_text]
        with evaluating(self.model):
            ids = sample(
                self.model,
                prompt,
                config,
                end_of_text=self.tokenizer.end_of_text,
                max_length=self.model_config.max_position_embeddings,
                windows=self.model_config.windows,
                multiple_of=self.world.layout.tp,
                seed=mix(self.config.training.seed, self.state.step),
                device=self.world.device,
                advance=self.watchdog.beat,
            )
        self.display.sample(config.prompt, self.tokenizer.decode(prompt + ids)[len(config.prompt) :])

    # Setting up

    def _build_data(self) -> None:
        config, world = self.config, self.world
        self.model_config = model_config(config.model)
        self.data = RunData(config, world, self.display)
        self.tokenizer = Tokenizer(self.data.prepared.tokenizer)

    def _build_model(self) -> None:
        config, training = self.config, self.config.training
        self.model = build_training_model(config, self.world, warn=self.display.warn)
        self.optimizer = build_optimizer(self.model, config, self.world)
        self.guard = StepGuard(training.spike_sigma, training.spike_window, self.world.device)

    def _build_checkpointer(self) -> None:
        self.identity = identity(self.config, dp=self.world.layout.dp)
        self.identity["data"] |= self.data.identity()
        self.checkpointer = Checkpointer(
            self.config.checkpoint,
            self.dump_folder / "checkpoint",
            model=self.model,
            optimizer=self.optimizer,
            settings=to_toml(self.config, dimensions=dataclasses.asdict(self.model_config)),
            tokenizer=self.data.prepared.tokenizer,
            about={
                "mesh": dataclasses.asdict(self.world.layout),
                "torch": torch.__version__,
                "tokenizer": self.identity["data"]["tokenizer"],
                "data": self.identity["data"]["content"],
            },
            say=self.display.warn,
            advance=self.watchdog.beat,
        )

    def _resume(self) -> None:
        if restarts := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "?")
            self.display.warn(f"a process of this run has died; starting again ({restarts} of {most} times)")
        wanted = asked = self.config.checkpoint.load_step
        if wanted > 0 and on_main(lambda: self.checkpointer.folder.newest_state().get("went_back_to")) == wanted:
            self.display.say(
                f"the run has gone back to step {wanted} before: going on from the newest checkpoint since"
            )
            wanted = -1
        step = self.checkpointer.find(wanted)
        if step is None:
            self._start_from_weights()
            return
        path = self.checkpointer.folder.path(step)
        state, saved_identity = self._read_state(step)
        manifest = on_main(lambda: read_manifest(path))
        for difference in check_same_run(saved_identity, self.identity, self.config, path):
            self.display.warn(difference)
        if changes := changed_settings(path, self.config):
            self.display.say(f"going on with other settings than before: {', '.join(changes)}")
        dropout = max(self.model_config.dropout, self.model_config.attention_dropout)
        if dropout and manifest.get("mesh") != self.checkpointer.about["mesh"]:
            self.display.warn("on another layout than before dropout draws other numbers")
        if asked > 0:
            state.went_back_to = asked
        self.state = state
        self._restore(step, saved_identity)

    def _read_state(self, step: int) -> tuple[TrainState, Identity]:
        """What the checkpoint of ``step`` says of the run. Raises UserError if no run wrote that."""
        path = self.checkpointer.folder.path(step)
        try:
            saved = on_main(lambda: self.checkpointer.folder.train_state(step))
            return TrainState.from_json(saved["state"]), saved["identity"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: its train_state.json cannot be used: {error!r}") from None

    def _restore(self, step: int, saved_identity: Identity) -> None:
        """Bring weights, optimizer and what goes with them to where they were at ``step``, as ``state`` has it."""
        same_optimizer = saved_identity["optimizer"] == self.identity["optimizer"]
        if not same_optimizer:
            self.optimizer.forget()
        self.checkpointer.load(step, optimizer=same_optimizer)
        self.optimizer.start_after(step - self.state.skipped.total)
        self.guard.losses = self.state.recent_losses

    def _start_from_weights(self) -> None:
        """Read the initial weights, if the run starts from any; each rank its own part."""
        source = self.config.initial_weights
        if not source:
            return

        def verified() -> Path:
            found = open_model(source, verify=True, say=self.display.warn, advance=self.watchdog.beat)
            found.check(self.model_config)
            return found.path

        found = open_model(str(on_main(verified)), verify=False)
        load_weights(found, dict(self.model.named_parameters()), advance=self.watchdog.beat)
        self.display.say(f"starting from the weights of {source}")
        if found.tokenizer is None and self.config.data.tokenizer == "train":
            self.display.warn(
                f"{source} has no tokenizer: one was trained on the corpus, and its ids mean something else than the "
                "weights have learnt; data.tokenizer names the right one"
            )
        section = self.config.model
        flavor = section.flavor
        if "flavor" in section.model_fields_set and spec_of(section.name).flavors[flavor] != self.model_config:
            self.display.warn(f'model.flavor = "{flavor}" does not apply: the dimensions are those of {source}')

    def _save(self, *, best: bool) -> None:
        self.log.flush()  # what was skipped so far
        self.state.data = self.data.loader.gather_state(self.world.dp_group)
        self.state.recent_losses = self.guard.losses
        figures = {"loss": self.log.last.get("loss"), "val_loss": None}
        if self.state.validated_step == self.state.step:
            figures["val_loss"] = self.log.last_validation.get("val_loss")  # none after a rewind
        train_state = {"state": dataclasses.asdict(self.state), "identity": self.identity}
        self.checkpointer.save(self.state.step, train_state, figures=figures, best=best)

    # Reporting

    def _open_log(self) -> None:
        config, layout, plan = self.config, self.world.layout, self.batch_plan
        if self.world.is_main:
            (self.dump_folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
            clear_preempted(self.dump_folder)
        total, seq_len = config.training.steps, config.training.seq_len
        active = self.model_config.num_active_parameters
        active = "" if active == self.model_config.num_parameters else f"{active / 1e6:,.1f} M of them active, "
        processes = f"{layout.world_size} × " if layout.world_size > 1 else ""
        precision: str = config.training.mixed_precision_param
        if multiply_in_fp32(DTYPES[precision], self.world.device):
            precision += " (multiplied in float32, as this CPU has no instructions for it)"
        self.display.say(
            f"{config.model.name} {config.initial_weights or config.model.flavor}, "
            f"{self.model_config.num_parameters / 1e6:,.1f} M parameters, {active}"
            f"{precision}, on {processes}{devices.name(self.world.device)}" + (f" ({layout})" if processes else "")
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
            learning_rates=self.optimizer.learning_rates,
            skipped=self.state.skipped,
            max_skipped=config.training.max_skipped_steps,
            rewinds=config.training.spike_action == "rewind",
            settings=config.model_dump(),
            corpora=self.data.mixture,
            report_padding=config.data.packing == "best_fit",
            on_problems=self.data.report_problems,
            describe_routing=self._describe_routing(),
        )

    def _describe_routing(self) -> Callable[[int, torch.Tensor], dict[str, Any]] | None:
        """How the log reads ``StepResult.routing``; None if the model has no experts."""
        shape = self.model_config
        if not spec_of(self.config.model.name).expert_parallel:
            return None
        return functools.partial(
            ExpertUse(self.display.warn).figures,
            sparse_layers=[layer for layer in range(shape.num_hidden_layers) if shape.is_sparse(layer)],
            experts_per_token=shape.num_experts_per_tok,
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
