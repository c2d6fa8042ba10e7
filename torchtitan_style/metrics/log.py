"""The log of a run: collects the figures of each step, and reads, records and prints them every few steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_style.config.schema import Metrics
from torchtitan_style.distributed.world import World

from .display import Display
from .events import add_event
from .planned import MakePlan, compared
from .recorder import Recorder
from .throughput import Meter


class StepTensors(Protocol):
    """What the log collects of a step; see ``train.step.StepResult``."""

    @property
    def loss(self) -> Tensor: ...
    @property
    def grad_norm(self) -> Tensor: ...
    @property
    def taken(self) -> Tensor: ...
    @property
    def update(self) -> Tensor: ...
    @property
    def batch_hash(self) -> int: ...
    @property
    def padding(self) -> int: ...
    @property
    def corpus_rows(self) -> tuple[int, ...]: ...
    @property
    def unreadable(self) -> int: ...
    @property
    def routing(self) -> Tensor | None: ...


@dataclasses.dataclass(frozen=True)
class StepFigures:
    """The same as numbers, of all ranks together."""

    step: int
    tokens_seen: int
    """Up to this step."""
    loss: float
    grad_norm: float
    taken: bool
    """Whether the weights were updated."""
    update: int
    """The number of this update (from 1), or that it would have had."""
    batch_hash: int
    unreadable: int = 0
    """Documents that could not be read."""
    padding: int = 0
    corpus_rows: tuple[int, ...] = ()
    routing: Tensor | None = None
    """``StepResult.routing``, on CPU."""


DescribeRouting = Callable[[int, Tensor], dict[str, Any]]
"""(step, ``StepResult.routing``) → figures."""


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
        settings: dict[str, Any],
        corpora: Sequence[str],
        report_padding: bool,
        plan: MakePlan | None = None,
        describe_routing: DescribeRouting | None = None,
    ) -> None:
        """first_step: the one before the first step of this log. learning_rates: those of an update, by name. corpora:
        names of the corpora of a mixture. plan: compared once with what is measured. describe_routing: of a
        model with experts, (step, ``StepResult.routing``) → figures."""
        self.describe_routing = describe_routing
        self._plan = plan if world.is_main else None
        self.config, self.world, self.display, self.meter = config, world, display, meter
        self.corpora, self.report_padding = corpora, report_padding
        self.first_step, self.last_step, self.tokens_per_step = first_step, last_step, tokens_per_step
        self.learning_rates = learning_rates
        self.last: dict[str, Any] = {}
        """The last record of a training step."""
        self.last_validation: dict[str, float] = {}
        self._pending: list[tuple[int, int, StepTensors]] = []
        self._timed_from: tuple[int, float] | None = None
        """The first step here, which may compile, and when it ended."""
        self._recorder = (
            Recorder(config, dump_folder, resumed_step=first_step, settings=settings, warn=display.warn)
            if world.is_main
            else None
        )
        self._folder = dump_folder
        self.event("start", first_step, layout=str(world.layout), processes=world.layout.world_size)
        display.start(first_step, last_step)
        meter.restart()

    def add(self, step: int, tokens_seen: int, result: StepTensors) -> None:
        """Collect the figures of a step, without waiting for the device."""
        self._pending.append((step, tokens_seen, result))
        self.meter.add_tokens(self.tokens_per_step)
        self.display.advance(step)

    def due(self, step: int) -> bool:
        """Whether to flush after ``step``."""
        # The first step includes compilation: by itself, so that it does not spoil the next figures.
        return step == self.first_step + 1 or step == self.last_step or step % self.config.log_freq == 0

    def flush(self) -> list[StepFigures]:
        """Read the figures collected since the last flush from the device, record and print them. Called by all ranks
        together; returns them, the same on all."""
        if not self._pending:
            return []
        figures = self._read()
        speed, now = self.meter.read(), time.time()
        records = [self._record(step, speed, now) for step in figures]
        for record, step in zip(records, figures, strict=True):
            if self.describe_routing is not None and step.routing is not None:
                record |= self.describe_routing(step.step, step.routing)
        line = self._compare_with_plan(records)
        if self._recorder:
            self._recorder.write(records)
        self.last = records[-1]
        self.display.step(self.last, steps=self.last_step, seconds_left=self._seconds_left(self.last["step"]))
        if line:
            self.display.say(line)
        return figures

    def _read(self) -> list[StepFigures]:
        """The collected figures, in numbers; one transfer from the device for each kind."""
        results = [result for _, _, result in self._pending]
        losses = torch.stack([result.loss for result in results])
        norms = torch.stack([result.grad_norm for result in results])
        taken = torch.stack([result.taken for result in results])
        updates = torch.stack([result.update for result in results])
        counts = torch.tensor(
            [[r.batch_hash, r.unreadable, r.padding, *r.corpus_rows] for r in results], device=losses.device
        )
        dist.all_reduce(counts, group=self.world.dp_group)  # hashes wrap around, as they should
        numbers = zip(losses.tolist(), norms.tolist(), taken.tolist(), updates.tolist(), strict=True)
        figures = [
            StepFigures(
                step,
                tokens_seen,
                *of_step,
                count[0],
                count[1],
                count[2],
                tuple(count[3:]),
                None if result.routing is None else result.routing.cpu(),
            )
            for (step, tokens_seen, result), of_step, count in zip(self._pending, numbers, counts.tolist(), strict=True)
        ]
        self._pending.clear()
        return figures

    def _record(self, figures: StepFigures, speed: dict[str, Any], now: float) -> dict[str, Any]:
        """The line of a step in metrics.jsonl."""
        return (
            {"step": figures.step, "loss": figures.loss, "grad_norm": figures.grad_norm}
            | self.learning_rates(figures.update)
            | ({} if figures.taken else {"skipped": True})
            | {"tokens_seen": figures.tokens_seen}
            | speed
            | {"time": now, "batch_hash": f"{figures.batch_hash % 2**64:016x}"}
            | self._data_figures(figures)
        )

    def _data_figures(self, figures: StepFigures) -> dict[str, float]:
        """What the rows of a step were made of, where that is not the same at every step."""
        found, rows = {}, figures.corpus_rows
        if self.corpora:
            found = {f"share_{name}": count / sum(rows) for name, count in zip(self.corpora, rows, strict=True)}
        if self.report_padding:
            found["padding_share"] = figures.padding / self.tokens_per_step
        return found

    def _compare_with_plan(self, records: list[dict[str, Any]]) -> str:
        """Add the planned figures to the last of ``records``, once; returns a line for a person, or "". The first step
        is not compared: it compiles, and memory is not all in use yet."""
        if self._plan is None or records[-1]["step"] == self.first_step + 1:
            return ""
        plan, self._plan = self._plan(), None
        if plan is None:
            return ""
        figures, line = compared(plan, records[-1])
        records[-1] |= figures
        self.meter.restart()  # planning is no training
        return line

    def _seconds_left(self, step: int) -> float | None:
        """From the mean time of the steps so far, with what came between them, as validation; None after the first."""
        now = time.perf_counter()
        if self._timed_from is None:
            self._timed_from = step, now
        first, since = self._timed_from
        if step >= self.last_step:
            return 0.0
        return (self.last_step - step) * (now - since) / (step - first) if step > first else None

    def validation(self, step: int, figures: dict[str, float], *, best: str = "") -> None:
        """Record and print the figures of a validation. best: as ``Display.validation``."""
        self.last_validation = figures
        if self._recorder:
            self._recorder.write([{"step": step} | figures | {"time": time.time()}])
        self.display.validation(step, figures, best=best)

    def event(self, event: str, step: int, **fields: Any) -> None:
        """Record what happened to the run (events.py)."""
        if self.world.is_main:
            add_event(self._folder, event, step, **fields)

    def sync(self) -> None:
        """Have the disk hold what was recorded, before a checkpoint of the step is saved."""
        if self._recorder:
            self._recorder.sync()

    def close(self) -> None:
        self.display.stop()
        if self._recorder:
            self._recorder.close()
