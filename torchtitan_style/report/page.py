"""Runs as one HTML file that needs nothing else: data, script and plotly.js are inside."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchtitan_style.common.errors import UserError

from .run import Run

MOST_POINTS = 5000
"""Of a curve."""
_PANELS = [
    ("Loss", r"loss|val_loss.*", "linear"),
    ("Perplexity of validation", r"val_perplexity.*", "log"),
    ("Accuracy of validation", r"val_accuracy.*", "linear"),
    ("Bits per byte of validation", r"val_bits_per_byte.*", "linear"),
    ("Learning rate", r"lr|lr_.*", "linear"),
    ("Gradient norm", r"grad_norm", "log"),
    ("Tokens per second", r"tokens_per_second", "linear"),
    ("Model FLOPs utilization (MFU)", r"mfu", "linear"),
    ("Peak memory in GiB", r"peak_memory_gib", "linear"),
    ("Share of the time waiting for data", r"data_wait_fraction", "linear"),
    ("Shares of the corpora", r"share_.*", "linear"),
    ("Share of padding", r"padding_share", "linear"),
]
"""Titles, the figures in them, the scale. Other figures have a panel each."""
_AXES = {"step", "time", "tokens_seen"}


def page(runs: Sequence[Run]) -> str:
    """The report. Raises UserError if plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError('the plotly package is missing; pip install plotly (the "report" extra) installs it') from None

    differing, same = _settings(runs)
    data = {
        "runs": [{"name": run.name, "axes": _axes(run)} for run in runs],
        "panels": list(_panels(runs)),
        "marks": [_mark(number, run, *mark) for number, run in enumerate(runs) for mark in run.marks],
    }
    fields = {
        "TITLE": escape(", ".join(run.name for run in runs)),
        "SUMMARY": _rows(["", *(run.name for run in runs)], [*differing, *_summary(runs)]),
        "SETTINGS": _rows(["", "value"], same),
        "SAMPLES": "".join(_samples(run) for run in runs),
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "PLOTLY": get_plotlyjs().replace("</script", "<\\/script"),
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)


def _panels(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    names = sorted({name for run in runs for name in run.curves} - _AXES)
    others = [name for name in names if not any(re.fullmatch(figures, name) for _, figures, _ in _PANELS)]
    for title, figures, scale in [*_PANELS, *((name, re.escape(name), "linear") for name in others)]:
        shown = [name for name in names if re.fullmatch(figures, name)]
        curves = [curve for number, run in enumerate(runs) for name in shown for curve in _curves(number, run, name)]
        if curves:
            yield {"title": title, "scale": scale, "curves": curves}


def _curves(number: int, run: Run, name: str) -> Iterator[dict[str, Any]]:
    """What is drawn of a figure, if the run has it; the training loss is drawn as it is and smoothed."""
    if name in run.curves:
        steps, values = run.curves[name]
        for title, y in {name: values, **({"loss, smoothed": smooth(values)} if name == "loss" else {})}.items():
            kept = thin(y)
            yield {"run": number, "name": title, "x": steps[kept].tolist(), "y": _numbers(y[kept])}


def thin(values: NDArray[Any], most: int = MOST_POINTS) -> NDArray[np.int64]:
    """Which points of a curve are drawn: all of up to ``most``. Of more, the lowest and the highest of each of
    ``most / 2`` groups of neighbours, so that no spike is lost."""
    if len(values) <= most:
        return np.arange(len(values))
    finite = values[np.isfinite(values)]
    known = np.where(np.isfinite(values), values, np.median(finite) if len(finite) else 0.0)
    groups = np.array_split(np.arange(len(values)), most // 2)
    kept = {int(group[pick(known[group])]) for group in groups for pick in (np.argmin, np.argmax)}
    return np.array(sorted(kept))


def smooth(values: NDArray[Any]) -> NDArray[np.float64]:
    """Exponential moving average that reaches back about a fiftieth of the run; what is not finite is skipped."""
    keep, total, weight, averages = 1 - 1 / max(1.0, len(values) / 50), 0.0, 0.0, []
    for value in values.tolist():
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight if weight else math.nan)
    return np.array(averages)


def _numbers(values: NDArray[Any]) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def _axes(run: Run) -> list[list[float | None]]:
    """Steps, tokens and hours, between which the page interpolates."""
    kept = np.unique(np.linspace(0, len(run.steps) - 1, MOST_POINTS).astype(int))
    return [run.steps[kept].tolist(), _numbers(run.tokens[kept]), _numbers(run.hours[kept])]


def _mark(number: int, run: Run, kind: str, step: int, text: str) -> dict[str, Any]:
    """At the loss of its step, or of the nearest one that has a loss."""
    steps, losses = run.curves["loss"]
    finite = np.isfinite(losses)
    near = losses[finite][np.abs(steps[finite] - step).argmin()] if finite.any() else 0.0
    return {"run": number, "kind": kind, "x": step, "y": float(f"{near:.6g}"), "text": text}


def _lowest(run: Run, name: str) -> str:
    return f"{np.nanmin(run.curves[name][1]):.4f}" if name in run.curves else "-"


def _summary(runs: Sequence[Run]) -> list[list[str]]:
    sets = sorted({name for run in runs for name in run.curves if name.startswith("val_loss/")})
    rows = {
        "step": [f"{run.steps[-1]:,} of {run.settings.get('training.steps', '?')}" for run in runs],
        "loss, smoothed": [f"{smooth(run.curves['loss'][1])[-1]:.4f}" for run in runs],
        "lowest validation loss": [_lowest(run, "val_loss") for run in runs],
        **{f"lowest {name}": [_lowest(run, name) for run in runs] for name in sets},
        "tokens": ["-" if math.isnan(run.tokens[-1]) else f"{run.tokens[-1]:,.0f}" for run in runs],
        "hours of training": [f"{run.hours[-1]:.2f}" for run in runs],
        "lines that cannot be read": [str(run.unreadable or "-") for run in runs],
    }
    return [[name, *cells] for name, cells in rows.items() if set(cells) != {"-"}]


def _settings(runs: Sequence[Run]) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of the settings that differ, with each run's value, and of those that do not, with theirs."""
    names = sorted({name for run in runs for name in run.settings} - {"job.dump_folder"})
    rows = [[name, *(run.settings.get(name, "-") for run in runs)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1], [row[:2] for row in rows if len(set(row[1:])) == 1]


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += [f"<th>{escape(name)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) for name, *row in rows]
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _samples(run: Run) -> str:
    if not run.samples:
        return ""
    texts = "".join(
        f"<h3>step {each['step']:,}</h3><pre><b>{escape(each['prompt'])}</b>{escape(each['text'])}</pre>"
        for each in run.samples[-100:]
    )
    return f"<details><summary>Samples of text: {escape(run.name)}</summary>{texts}</details>"
