"""A run as the report needs it: its figures by step, and what happened to it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.reading import json_lines
from torchtitan_style.common.typed import Content, Count, Seconds
from torchtitan_style.config.files import flat, read_toml
from torchtitan_style.metrics.events import EVENTS


class _Record(Content, extra="allow"):
    """What the report relies on in a line of metrics.jsonl or events.jsonl, where it has that."""

    step: Count
    loss: float | None = None
    tokens_seen: Count = 0
    time: Seconds = 0.0
    event: str | None = None
    layout: str | None = None
    to: Count = 0
    prompt: str = ""
    text: str = ""


Curve = tuple[NDArray[np.int64], NDArray[np.float64]]


class Run:
    """steps: those with figures, in order. curves: by name, the steps and the values. marks: kind, step and a text.

    Raises UserError if there is no run in ``folder``, or it has not taken a step yet.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        config, metrics = folder / "config.toml", folder / "metrics.jsonl"
        if not config.is_file() and not metrics.is_file():
            raise UserError(f"{folder}: is not the folder of a run: it has neither config.toml nor metrics.jsonl")
        settings = flat(read_toml(config)) if config.is_file() else {}
        self.settings = {key: json.dumps(value, default=str) for key, value in settings.items()}
        figures, damaged_figures = _figures(metrics)
        events, damaged_events = _records(folder / EVENTS)
        self.unreadable = damaged_figures + damaged_events
        trained = {step: record for step, record in figures.items() if "loss" in record}
        if not trained:
            raise UserError(f"{folder}: no step is recorded yet; metrics.jsonl gets a line for each step of training")
        self.steps = np.array(list(trained))
        self.tokens = _column(trained, "tokens_seen")
        self.hours = _hours(self.steps, _column(trained, "time"), events)
        self.curves = _curves(figures)
        self.marks = [*_marks(events), *(("skipped", s, "skipped") for s, r in trained.items() if r.get("skipped"))]
        self.samples = [event for event in events if {"prompt", "text"} <= event.keys()]


def _records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a file of JSON objects with a step, and how many others there are, as cut by a full disk."""
    try:
        values = [value for _, value in json_lines(path)] if path.is_file() else []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    found = [value for value in values if _is_record(value)]
    return found, len(values) - len(found)


def _is_record(value: Any) -> bool:
    try:
        _Record.model_validate(value)
    except ValueError:
        return False
    return all(not isinstance(number, int) or abs(number) < 2**63 for number in value.values())


def _figures(path: Path) -> tuple[dict[int, dict[str, Any]], int]:
    """Figures of each step, training and validation together. Of a step that was done twice, the later ones."""
    records, damaged = _records(path)
    figures: dict[int, dict[str, Any]] = {}
    for record in records:
        if "loss" not in record:
            record.pop("time", None)  # of its validation, which is later
        figures[record["step"]] = figures.get(record["step"], {}) | record
    return dict(sorted(figures.items())), damaged


def _curves(figures: dict[int, dict[str, Any]]) -> dict[str, Curve]:
    points: dict[str, tuple[list[int], list[float]]] = {}
    for step, record in figures.items():
        for name, value in record.items():
            if type(value) in (int, float, type(None)):  # null is NaN or infinity
                steps, values = points.setdefault(name, ([], []))
                steps.append(step)
                values.append(math.nan if value is None else value)
    curves = {name: (np.array(steps), np.array(values, dtype=float)) for name, (steps, values) in points.items()}
    return {name: curve for name, curve in curves.items() if name == "loss" or np.isfinite(curve[1]).any()}


def _column(records: dict[int, dict[str, Any]], name: str) -> NDArray[np.float64]:
    return np.array([record.get(name, math.nan) for record in records.values()], dtype=float)


def _hours(steps: NDArray[Any], times: NDArray[Any], events: list[dict[str, Any]]) -> NDArray[np.float64]:
    """Hours of training up to each step, without those in which the run was down.

    Steps that were logged together have one time, that of the last of them; the others are spread evenly before it.
    """
    at, times = steps[np.isfinite(times)], times[np.isfinite(times)]
    starts = np.array([math.nan, *sorted(e["time"] for e in events if e.get("event") == "start" and "time" in e)])
    since = np.fmax(starts[np.searchsorted(starts[1:], times, side="right")], np.append(math.nan, times)[:-1])
    hours = np.cumsum(np.fmax(times - since, 0)) / 3600
    ends = np.diff(hours, append=math.inf) > 0
    return np.interp(steps, np.append(0, at[ends]), np.append(0, hours[ends]))


def _marks(events: list[dict[str, Any]]) -> Iterator[tuple[str, int, str]]:
    layout, before = None, ""
    for event in events:
        kind, step = event.get("event"), event["step"]
        if kind == "start" and step and before != "rewind":  # after a rewind the same processes go on
            yield "resumed", step, f"resumed: {event.get('layout')}"
        if kind == "start":
            if layout not in (None, event.get("layout")):
                yield "layout changed", step, f"{layout} → {event.get('layout')}"
            layout = event.get("layout")
        if kind == "rewind":
            yield "rewound", event.get("to", step), f"rewound from step {step} to {event.get('to')}"
        if kind == "checkpoint":
            yield "checkpoint", step, "checkpoint"
        before = kind or ""
