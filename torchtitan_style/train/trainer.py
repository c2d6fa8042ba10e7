"""Training, from a checked configuration to a trained model.

Read ``Trainer._train``, the loop, first, then ``train_step`` in ``step.py``. What else the loop uses:

    resume.py, rewind.py      start from a checkpoint; go back to one
    policy.py                 what to do about bad steps
    stopping.py               what happens on SIGTERM
    validator.py, text.py     validation; samples of text
    observer.py               callbacks of one's own
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from pathlib import Path

from torchtitan_style.common import device as devices
from torchtitan_style.common.errors import RunError, UserError
from torchtitan_style.common.signals import shielding_children
from torchtitan_style.config import Config
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer
from torchtitan_style.distributed.world import World, on_main, set_timeout
from torchtitan_style.metrics.display import Display
from torchtitan_style.metrics.planned import MakePlan
from torchtitan_style.metrics.profiler import profile_step
from torchtitan_style.metrics.throughput import Meter
from torchtitan_style.models.trained import flops_per_token
from torchtitan_style.optim.guard import StepGuard

from .agreement import Agreement
from .data import RunData
from .garbage import GarbageCollector
from .observer import observers
from .open_log import open_log
from .policy import Decision, StepPolicy
from .preempted import clear_preempted, write_preempted
from .resume import Resume, build_checkpointer, identity_of_run
from .rewind import rewind
from .state import TrainState
from .step import DTYPES, StepResult, build_optimizer, build_training_model, train_step
from .stopping import interrupted, on_interrupt, stop_gracefully, stopped, told_to_stop, trained_already
from .text import continue_prompt
from .validator import Validator
from .watchdog import Watchdog


class Trainer:
    """The parts of a run, and its loop. Made and run by all ranks together.

    The caller must hold the dump folder (``launch.run_lock``): two runs in one would overwrite each other.
    """

    def __init__(self, config: Config, world: World, *, plan: MakePlan | None = None) -> None:
        self.config, self.world, self.plan = config, world, plan
        self.dump_folder = Path(config.job.dump_folder)
        self.display = Display(is_main=world.is_main)
        self.observer = observers()
        self.state = TrainState()
        if config.debug.deterministic:
            devices.use_deterministic_algorithms()
        self.data = RunData(config, world, self.display)
        self.tokenizer = Tokenizer(self.data.prepared.tokenizer)
        stop_gracefully()
        self.agreement = Agreement()
        self.stop_signal = 0
        """The signal that the ranks have agreed to stop for; 0: none."""
        limit, stages = config.comm.init_timeout_seconds, world.layout.pp
        self.watchdog = Watchdog(self.dump_folder / "hang", limit=limit, warn=self.display.warn, stages=stages)
        self.model = build_training_model(config, world, warn=self.display.warn)
        self.optimizer = build_optimizer(self.model, config, world)
        self.guard = StepGuard(config.training.spike_sigma, config.training.spike_window, world.device)
        self.identity = identity_of_run(config, self.data)
        self.checkpointer = build_checkpointer(
            config,
            self.model,
            self.optimizer,
            self.data,
            identity=self.identity,
            warn=self.display.warn,
            observer=self.observer,
            record_progress=self.watchdog.record_progress,
        )
        self.resume = Resume(
            config,
            self.checkpointer,
            self.guard,
            identity=self.identity,
            layout=world.layout,
            display=self.display,
            observer=self.observer,
        )
        self.validator = Validator(
            config.validation,
            self.model,
            self.data.validation_batches,
            sets=self.data.validation_sets,
            last_step=config.training.steps,
            group=world.result_group,
            stages=world.layout.pp,
            observer=self.observer,
        )
        self.is_warm = False
        """Whether the first step, which may compile, is done."""
        self.gc = GarbageCollector(every=config.training.gc_freq)
        on_interrupt(lambda: self.display.say(interrupted(self.state.step, self.checkpointer.folder)))
        dtype = DTYPES[config.training.mixed_precision_param]
        self.meter = Meter(world, flops_per_token=flops_per_token(config), dtype=dtype)

    def run(self) -> None:
        """Resume if there is a checkpoint, train, and close everything."""
        state = self.state = self.resume.start()
        self.policy = StepPolicy(self.config.training, state, warn=self.display.warn)
        if self._is_done():
            on_main(lambda: clear_preempted(self.dump_folder))  # a scheduler would restart a finished run for ever
            self.display.say(trained_already(state.step, self.dump_folder))
            return
        if state.step:
            on_main(lambda: self.checkpointer.folder.set_aside_after(state.step, self.display.warn))
        with shielding_children():
            self.data.loader.start(state.data)
        self.observer.after_start()
        self._open_log()
        try:
            self._train()
            done = self._is_done()
            if not done:
                self._stop_early()
            self.checkpointer.close()
        except (RunError, UserError):
            self.checkpointer.wait()
            raise
        finally:
            self.data.loader.close()
            self.log.close()
            self.watchdog.close()
        if done:
            self.display.say(f"done: {state.step} steps; everything is in {self.dump_folder}")

    def _train(self) -> None:
        """Train to the last step, or until told to stop."""
        state, steps = self.state, self.config.training.steps
        self._stop_requested()  # a signal may have come meanwhile
        self._catch_up_on_validation()
        while state.step < steps and not self._stop_requested():
            state.step += 1
            result = self._train_step()
            self.log.add(state.step, state.rows_seen * self.config.training.seq_len, result)
            validates, saves = self.validator.due(state), self._save_is_due()
            reviews = self.log.due(state.step) or validates or saves
            if reviews and self._review_steps() is Decision.REWIND and self._rewind():
                continue
            best = validates and self._validate()
            if saves or (best and self.config.checkpoint.enable):
                self._save(best=best)
            if validates or state.step == steps:
                self._print_sample()
            if validates or saves:
                self.meter.restart()
        self._review_steps()

    def _train_step(self) -> StepResult:
        step = self.state.step
        self.observer.before_step(step)
        with contextlib.ExitStack() as stack:
            profiling = profile_step(self.config.profiling, step, folder=self.dump_folder, rank=self.world.rank)
            stack.enter_context(profiling)
            with self.meter.waiting_for_data():
                batch = self.data.next_batch()
            self.state.rows_seen += self.data.batch_plan.global_batch_size
            if not self.is_warm:  # the first step is compiled, by processes of their own
                stack.enter_context(shielding_children())
            result = train_step(
                self.model,
                self.optimizer,
                batch,
                step=step,
                config=self.config,
                world=self.world,
                guard=self.guard,
                observer=self.observer,
            )
        self.watchdog.record_progress(step)
        self.gc.step()
        return result

    def _review_steps(self) -> Decision:
        """Read and write the figures of the steps since the last time, and decide how to go on. Waits for the device.

        Raises RunError if too many steps were skipped, and UserError if too many documents cannot be read.
        """
        figures = self.log.flush()
        if figures and not self.is_warm:  # later steps are not compiled, and take less time
            self.is_warm = True
            self.watchdog.limit = self.config.comm.train_timeout_seconds
            set_timeout(self.config.comm.train_timeout_seconds)
        if any(step.unreadable for step in figures):
            self.data.report_problems()
        return self.policy.review(figures)

    def _rewind(self) -> bool:
        """Go back to the newest checkpoint; False if there is none."""
        step = self.state.step
        if not rewind(self.state, self.policy, self.resume):
            return False
        self.log.event("rewind", step, to=self.state.step)
        self.log.close()
        self._open_log()
        return True

    # Validation, samples of text, checkpoints

    def _validate(self) -> bool:
        """Loss on the held-out rows. Whether it is the lowest so far and its checkpoint is to be kept as the best."""
        state = self.state
        with self.display.doing("validating"):
            figures = self.validator.run(state.step, stop=self._stop_requested)
        if figures is None:
            return False
        metric = self.config.checkpoint.best_metric
        best = state.update_best(figures[metric], self.data.best_metric)
        self.log.validation(state.step, figures, best=metric if best and state.step > 0 else "")
        return best and self.config.checkpoint.keep_best

    def _catch_up_on_validation(self) -> None:
        """Validate before the first step, and on a resume if the run was stopped before it had."""
        if self.validator.due(self.state):
            best = self._validate()
            done = not self.validator.due(self.state)  # and not told to stop meanwhile
            if done and self.state.step and self.config.checkpoint.enable:  # else the next start would do it again
                self._save(best=best)
            self.meter.restart()

    def _print_sample(self) -> None:
        """Print a sample of text, unless the run is about to stop."""
        config = self.config
        if config.generation.enable and not self.stop_signal:
            step, record_progress = self.state.step, self.watchdog.record_progress
            text = continue_prompt(
                self.model, config, self.world, self.tokenizer, step=step, record_progress=record_progress
            )
            self.display.sample(config.sample_prompt, text)
            self.log.event("sample", step, prompt=config.sample_prompt, text=text)

    def _save_is_due(self) -> bool:
        config, step = self.config, self.state.step
        return config.checkpoint.enable and (step == config.training.steps or step % config.checkpoint.interval == 0)

    def _save(self, *, best: bool) -> None:
        state = self.state
        state.data = self.data.loader.gather_state(self.world.dp_group)
        state.recent_losses = self.guard.losses
        figures = {"loss": self.log.last.get("loss"), "val_loss": None}
        if state.validated_step == state.step:
            figures["val_loss"] = self.log.last_validation.get("val_loss")  # none after a rewind
        train_state = {"state": dataclasses.asdict(state), "identity": self.identity}
        self.log.sync()  # a power cut must not leave a checkpoint without the lines of its steps
        self.checkpointer.save(state.step, train_state, figures=figures, best=best)
        self.log.event("checkpoint", state.step)

    # Stopping

    def _is_done(self) -> bool:
        return self.state.step >= self.config.training.steps and not self.validator.due(self.state)

    def _stop_requested(self) -> bool:
        """Whether all ranks stop now, because one of them was told to. Asked by all equally often."""
        if not self.stop_signal:
            self.stop_signal, busy = self.agreement.exchange(told_to_stop(), self.checkpointer.is_busy)
            self.checkpointer.finish_when_idle(busy=bool(busy))
            self.watchdog.record_progress()
        return bool(self.stop_signal)

    def _stop_early(self) -> None:
        """Save, and write preempted.json, so that a scheduler can start the run again."""
        step, folder = self.state.step, self.checkpointer.folder
        self.checkpointer.finish()
        if self.config.checkpoint.enable and step and self.checkpointer.saved_step != step:
            self._save(best=False)
        self.checkpointer.close()
        saved = str(folder.path(step)) if self.checkpointer.saved_step == step else None
        name = signal.Signals(self.stop_signal).name
        on_main(lambda: write_preempted(self.dump_folder, step=step, checkpoint=saved, signal=name))
        self.display.say(stopped(step, name, saved))

    # Setting up

    def _open_log(self) -> None:
        self.log = open_log(
            self.config,
            self.world,
            self.state,
            self.data,
            display=self.display,
            meter=self.meter,
            learning_rates=self.optimizer.learning_rates,
            plan=self.plan,
        )
