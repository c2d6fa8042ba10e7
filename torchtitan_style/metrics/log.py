"""The log of a run: collects what each step leaves, and reads, records and prints it now and then."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_style.common.errors import RunError
from torchtitan_style.config.schema import Metrics
from torchtitan_style.data.problems import Problem
from torchtitan_style.distributed.world import World

from .display import Display
from .recorder import Recorder
from .throughput import Meter

__all__ = ["SkippedSteps", "StepResult", "TrainingLog"]


@dataclasses.dataclass
class SkippedSteps:
    """Steps that the weights were not updated in."""

    total: int = 0
    in_a_row: int = 0
    """Up to the last step."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step leaves for the log: tensors, so that nobody waits for the device."""

    loss: Tensor
    """Mean over all tokens of the step; 0-dim fp32, the same on all ranks."""
    grad_norm: Tensor
    """Global, before clipping; 0-dim fp32, the same on all ranks."""
    taken: Tensor
    """Whether the weights were updated; 0-dim bool, the same on all ranks."""
    batch_hash: int
    """This rank's share, signed; the shares of the dp ranks add up modulo 2⁶⁴."""
    padding: int = 0
    """Positions of this rank's rows that are padding."""
    corpus_rows: tuple[int, ...] = ()
    """This rank's rows from each corpus."""
    problems: tuple[Problem, ...] = ()
    """Documents that this rank could not read."""
    routing: Tensor | None = None
    """Of a model with experts: how they were used, see ``train/balance.py``; the same on all ranks."""


class TrainingLog:
    """Every rank has one, as some figures are sums over ranks; the main rank writes and prints."""

    def __init__(
        self,
        config: Metrics,
        world: World,
        display: Display,
        dump_folder: Path,
        *,
        first_step: int,
        last_step: int,
        tokens_per_step: int,
        meter: Meter,
        learning_rates: Callable[[int], dict[str, float]],
        skipped: SkippedSteps,
        max_skipped: int,
        rewinds: bool,
        settings: dict[str, Any],
        corpora: Sequence[str],
        report_padding: bool,
        on_problems: Callable[[list[Problem]], None],
        describe_routing: Callable[[int, Tensor], dict[str, Any]] | None = None,
    ) -> None:
        """learning_rates: those of an update, by name. skipped: is kept up to date. max_skipped: how many in a row
        are let pass; with ``rewinds`` the caller sees to those that spiked. corpora: names of the corpora of a
        mixture. on_problems: called by all ranks with their own documents that could not be read, if some rank has
        any. describe_routing: of a model with experts, (step, ``StepResult.routing``) → figures."""
        self.config, self.world, self.display, self.meter = config, world, display, meter
        self.corpora, self.report_padding, self.on_problems = corpora, report_padding, on_problems
        self.describe_routing = describe_routing
        self.last_step, self.tokens_per_step = last_step, tokens_per_step
        self.learning_rates, self.skipped = learning_rates, skipped
        self.max_skipped, self.rewinds = max_skipped, rewinds
        self.spiked = False
        """Whether a step was skipped though its figures were finite."""
        self.last: dict[str, Any] = {}
        """The last record of a training step."""
        self.last_validation: dict[str, float] = {}
        self._pending: list[tuple[int, int, StepResult]] = []
        self._is_first = True
        self._longest = skipped.in_a_row
        """Skipped steps in a row, the most since the last flush."""
        self._recorder = (
            Recorder(config, dump_folder, resumed_step=first_step, settings=settings, warn=display.warn)
            if world.is_main
            else None
        )
        display.start(first_step, last_step)
        meter.restart()

    def add(self, step: int, tokens_seen: int, result: StepResult) -> None:
        """Take note of a step; the figures may stay on the device for now."""
        self._pending.append((step, tokens_seen, result))
        self.meter.add_tokens(self.tokens_per_step)
        self.display.advance(step)
        # The first step includes compilation: by itself, so that it does not spoil the next figures.
        if self._is_first or step == self.last_step or step % self.config.log_freq == 0:
            self.flush()
        self._is_first = False

    def flush(self) -> None:
        """Read the figures of the steps since the last time from the device, record and print them.

        Raises RunError if too many in a row were skipped.
        """
        if not self._pending:
            return
        losses = torch.stack([result.loss for _, _, result in self._pending])
        norms = torch.stack([result.grad_norm for _, _, result in self._pending])
        problems = [problem for _, _, result in self._pending for problem in result.problems]
        counts = torch.tensor(
            [[r.batch_hash, len(r.problems), r.padding, *r.corpus_rows] for _, _, r in self._pending],
            device=losses.device,
        )
        taken = torch.stack([result.taken for _, _, result in self._pending])
        dist.all_reduce(counts, group=self.world.dp_group)  # hashes wrap around, as they should
        speed = self.meter.read()
        records = [
            {"step": step, "loss": loss, "grad_norm": norm}
            | self._count(step, was_taken)
            | {"tokens_seen": tokens_seen}
            | speed
            | {"batch_hash": f"{batch_hash % 2**64:016x}"}
            | self._data_figures(padding, corpus_rows)
            for (step, tokens_seen, _), loss, norm, was_taken, (batch_hash, _, padding, *corpus_rows) in zip(
                self._pending, losses.tolist(), norms.tolist(), taken.tolist(), counts.tolist(), strict=True
            )
        ]
        if self.describe_routing is not None:
            routing = [(step, result.routing) for step, _, result in self._pending if result.routing is not None]
            for record, (step, sums) in zip(records, routing, strict=True):
                record |= self.describe_routing(step, sums.cpu())
        self._pending.clear()
        if any(count for _, count, *_ in counts.tolist()):
            self.on_problems(problems)
        if self._recorder:
            self._recorder.write(records)
        self.last = records[-1]
        step = self.last["step"]
        seconds_left = (self.last_step - step) * self.tokens_per_step / speed["tokens_per_second"]
        self.display.step(self.last, steps=self.last_step, seconds_left=seconds_left)
        for record in records:
            if "skipped" in record:
                self._report_skipped(record)
        longest, self._longest = self._longest, self.skipped.in_a_row
        if longest > self.max_skipped and not (self.rewinds and self.spiked):
            raise RunError(
                f"{longest} steps in a row were skipped (training.max_skipped_steps is "
                f"{self.max_skipped}); the weights were not changed by them. A lower optimizer.lr or "
                "training.max_norm, or a longer lr_scheduler.warmup_steps, may help"
            )

    def _count(self, step: int, taken: bool) -> dict[str, Any]:
        """The learning rates of a step; takes note if it was skipped."""
        figures: dict[str, Any] = self.learning_rates(step - self.skipped.total)
        if taken:
            self.skipped.in_a_row = 0
            return figures
        self.skipped.total += 1
        self.skipped.in_a_row += 1
        self._longest = max(self._longest, self.skipped.in_a_row)
        return figures | {"skipped": True}

    def _report_skipped(self, record: dict[str, Any]) -> None:
        is_spike = math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])
        self.spiked |= is_spike
        self.display.warn(
            f"step {record['step']} was skipped: loss {record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}: "
            + ("a spike (training.spike_sigma)" if is_spike else "not finite")
        )

    def _data_figures(self, padding: int, corpus_rows: list[int]) -> dict[str, float]:
        """What the rows of a step were made of, where that is not the same at every step."""
        figures = {}
        if self.corpora:
            figures = {f"share_{n}": r / sum(corpus_rows) for n, r in zip(self.corpora, corpus_rows, strict=True)}
        if self.report_padding:
            figures["padding_share"] = padding / self.tokens_per_step
        return figures

    def validation(self, step: int, figures: dict[str, float], *, best: bool) -> None:
        """Record and print the figures of a validation."""
        self.last_validation = figures
        if self._recorder:
            self._recorder.write([{"step": step} | figures])
        self.display.validation(step, figures, best=best)

    def close(self) -> None:
        self.display.stop()
        if self._recorder:
            self._recorder.close()
