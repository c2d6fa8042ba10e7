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
from torchtitan_style.config.files import read_toml
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
    """steps: those with figures, in order. curves: by name, the steps and the values. marks: kind, step and a text."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        path = folder / "config.toml"
        self.settings = _flat(read_toml(path)) if path.is_file() else {}
        figures, self.unreadable = _figures(folder / "metrics.jsonl")
        if not any("loss" in record for record in figures.values()):
            raise UserError(f"{folder}: no step is recorded yet; metrics.jsonl gets a line for each step of training")
        events, damaged = _records(folder / EVENTS)
        self.unreadable += damaged
        self.steps = np.array([step for step, record in figures.items() if "loss" in record])
        trained = [figures[step] for step in self.steps.tolist()]
        self.tokens = np.array([record.get("tokens_seen", math.nan) for record in trained], dtype=float)
        self.hours = _hours(self.steps, [record.get("time", math.nan) for record in trained], events)
        self.curves = _curves(figures)
        self.marks = [*_marks(events), *(("skipped", s, "skipped") for s, r in figures.items() if r.get("skipped"))]
        self.samples = [event for event in events if {"prompt", "text"} <= event.keys()]


def read_run(folder: Path, name: str) -> Run:
    """Raises UserError if there is no run in ``folder``, or it has not got to its first step."""
    if not (folder / "config.toml").is_file() and not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: is not the folder of a run: it has neither config.toml nor metrics.jsonl")
    return Run(folder, name)


def _records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a file of JSON objects with a step, and how many others there are, as cut by a full disk."""
    found: list[dict[str, Any]] = []
    damaged = 0
    try:
        for _, record in json_lines(path) if path.is_file() else ():
            good = isinstance(record, dict) and _is_record(record)
            found += [record] if good else []
            damaged += not good
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return found, damaged


def _is_record(record: dict[str, Any]) -> bool:
    try:
        _Record.model_validate(record)
    except ValueError:
        return False
    return all(not isinstance(value, int) or abs(value) < 2**63 for value in record.values())


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
            if type(value) in (int, float) or (value is None and name in points):  # null is NaN or infinity
                steps, values = points.setdefault(name, ([], []))
                steps.append(step)
                values.append(math.nan if value is None else value)
    return {name: (np.array(steps), np.array(values, dtype=float)) for name, (steps, values) in points.items()}


def _hours(steps: NDArray[np.int64], times: list[float], events: list[dict[str, Any]]) -> NDArray[np.float64]:
    """Hours of training up to each step, without those in which the run was down.

    Steps that were logged together have one time, that of the last of them; the others are spread evenly before it.
    """
    elapsed, total, last = [], 0.0, math.nan
    starts = [event["time"] for event in events if event.get("event") == "start" and "time" in event]
    for time in times:
        began = max((start for start in starts if start <= time), default=math.nan)
        since = began if math.isnan(last) or began > last else last
        total += max(time - since, 0.0) if time == time and since == since else 0.0
        last = time if time == time else last
        elapsed.append(total / 3600)
    hours = np.array(elapsed)
    ends = np.append(hours[1:] != hours[:-1], True)
    return np.interp(steps, np.append(0, steps[ends]), np.append(0.0, hours[ends]))


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


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Keys as on the command line, values as JSON."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: json.dumps(value)}
    return found
