"""The report of runs that are made up: what it reads, what it leaves out, and the page in a browser."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.browser import CHROMIUM, Page, opened
from torchtitan_style.__main__ import main
from torchtitan_style.metrics.events import add_event
from torchtitan_style.report.page import MOST_POINTS, smooth, thin
from torchtitan_style.report.run import Run

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def make_run(folder: Path, *, steps: int = 100, lr: float = 1e-3, start: float = 1e9) -> Path:
    """A run with two resumes, the second in another layout, a skipped step, a checkpoint and a rewind."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f"[training]\nsteps = 200\n[optimizer]\nlr = {lr}\n[model]\nname = 'qwen3'\n")
    lines: list[dict[str, Any]] = [{"step": 0, "val_loss": 9.0, "val_perplexity": 8103.0, "time": start}]
    for step in range(1, steps + 1):
        loss = 3 + 6 * math.exp(-step * lr * 30) + 0.1 * math.sin(step * 7)
        record = {"step": step, "loss": loss, "grad_norm": 1 + 1 / step, "lr": lr, "tokens_seen": 1000 * step}
        record |= {"tokens_per_second": 5000.0, "mfu": 0.5, "peak_memory_gib": 1.5, "data_wait_fraction": 0.01}
        record |= {"share_code": 0.7, "share_text": 0.3, "padding_share": 0.1, "experts_busiest": 1.3}
        # It was down for a day after step 40.
        record |= {"time": start + step * 36.0 + (86_400 if step > 40 else 0), "batch_hash": "0" * 16}
        lines.append(record | ({"skipped": True} if step == 30 else {}))
        if step % 50 == 0:
            lines.append({"step": step, "val_loss": loss + 0.1, "val_perplexity": math.exp(loss + 0.1), "time": start})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [
        {"event": "start", "step": 0, "layout": "dp 1 × tp 1", "time": start},
        {"event": "checkpoint", "step": 20, "time": start},
        {"event": "start", "step": 20, "layout": "dp 1 × tp 1", "time": start + 20 * 36 + 1},
        {"event": "start", "step": 40, "layout": "dp 2 × tp 1", "time": start + 86_400 + 40 * 36 + 1},
        {"event": "rewind", "step": 70, "to": 60, "time": start},
        {"event": "start", "step": 60, "layout": "dp 2 × tp 1", "time": start},
        {"event": "sample", "step": 50, "prompt": "<b>", "text": "</script>&", "time": start},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


MARKS = [
    ("checkpoint", 20), ("resumed", 20), ("resumed", 40), ("layout changed", 40), ("rewound", 60), ("skipped", 30),
]  # fmt: skip


def report(capsys: pytest.CaptureFixture[str], *runs: Path, output: Path) -> str:
    pytest.importorskip("plotly", reason="needs plotly, of the report extra")
    main(["report", *map(str, runs), "--output", str(output)])
    assert capsys.readouterr().out == f"the report is {output}\n"
    return output.read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, Any]:
    line = next(line for line in page.splitlines() if line.startswith("const data = "))
    found: dict[str, Any] = json.loads(line.removeprefix("const data = ").removesuffix(";"))
    return found


def in_browser(page: Path, profile: Path, look: Callable[[Page], Any], *, width: int = 1200, dark: bool = False) -> Any:
    async def go() -> Any:
        async with opened(profile) as tab:
            await tab.load(page, width=width, dark=dark)
            found = await look(tab)
            assert tab.complaints == []
            assert tab.requests == [page.as_uri()]  # and nothing over a network
            return found

    return asyncio.run(go())


def test_events_are_marked_and_time_is_that_of_training(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path / "run"), "run")
    assert [(kind, step) for kind, step, _ in run.marks] == MARKS
    assert [text for kind, _, text in run.marks if kind == "layout changed"] == ["dp 1 × tp 1 → dp 2 × tp 1"]
    assert run.hours == pytest.approx(run.steps * 0.01, abs=0.001)  # without the day
    assert run.curves["val_loss"][0].tolist() == [0, 50, 100]
    assert len(run.curves["loss"][0]) == 100


def test_steps_that_were_logged_together_are_spread_evenly(tmp_path: Path) -> None:
    times = {1: 1010.0, 2: 1040.0, 3: 1040.0, 4: 1040.0, 5: None, 6: 1500.0}  # the fifth line has lost it
    lines = [{"step": step, "loss": 1.0} | ({"time": time} if time else {}) for step, time in times.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    starts = [{"event": "start", "step": step, "time": time} for step, time in ((0, 1000.0), (5, 1490.0))]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    assert Run(tmp_path, "run").hours * 3600 == pytest.approx([10, 20, 30, 40, 45, 50])
    (tmp_path / "events.jsonl").unlink()  # as in a run of version 0.1: when it started is not known
    assert Run(tmp_path, "run").hours[-1] * 3600 == pytest.approx(490)


def test_a_damaged_file_is_read_as_far_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [{"step": step, "loss": 10.0 - step} for step in (1, 2, 3, 4)]
    again = [{"step": step, "loss": 20.0 - step} for step in (3, 4, 5)]
    text = "".join(json.dumps(line) + "\n" for line in lines + again)
    (folder / "metrics.jsonl").write_text(text + '[1]\n{"step": 6, "loss": null}\n{"step": 7, "lo')
    run = Run(folder, "run")
    assert run.curves["loss"][0].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.curves["loss"][1][:5].tolist() == [9.0, 8.0, 17.0, 16.0, 15.0]  # the later ones of steps done twice
    assert run.unreadable == 2
    found = data_of(report(capsys, folder, output=tmp_path / "page.html"))
    [raw, smoothed] = found["panels"][0]["curves"]
    assert raw["y"] == [9.0, 8.0, 17.0, 16.0, 15.0, None]
    assert smoothed["y"][-1] == 15.0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not the folder of a run: it has neither config.toml nor metrics.jsonl"),
        ({"config.toml": "[training]\nsteps = 3\n"}, "no step is recorded yet"),
        ({"metrics.jsonl": '{"step": 0, "val_loss": 9.0}\n'}, "no step is recorded yet"),
        ("a file", "is a file; name the folder of the run"),
        (None, "there is no such folder; did you mean "),
    ],
)
def test_what_is_no_run(
    files: dict[str, str] | str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs"
    (tmp_path / "run2").mkdir()
    if isinstance(files, str):
        folder.write_text(files)
    elif files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(["report", str(folder)])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}: ")
    assert message in error
    assert not (folder / "report.html").exists()


def test_a_page_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly", reason="needs plotly, of the report extra")
    with pytest.raises(SystemExit) as exit:
        main(["report", str(make_run(tmp_path / "run", steps=2)), "--output", "/dev/full"])
    assert exit.value.code == 1
    assert capsys.readouterr().err == "error: /dev/full: cannot be written: No space left on device\n"


def test_long_curves_are_thinned_and_keep_their_spikes() -> None:
    values = np.sin(np.arange(1_000_000) / 1000)
    values[123_456], values[777_777], values[5] = 50.0, -50.0, math.nan
    kept = thin(values)
    assert len(kept) <= MOST_POINTS
    assert {123_456, 777_777} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert thin(values[:MOST_POINTS]).tolist() == list(range(MOST_POINTS))


def test_losses_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"step": step, "loss": None, "mfu": None} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [panel] = data_of(report(capsys, tmp_path, output=tmp_path / "page.html"))["panels"]
    assert panel["title"] == "Loss"
    assert panel["curves"][0] == {"run": 0, "name": "loss", "x": [1, 2], "y": [None, None]}


def test_smoothing() -> None:
    assert smooth(np.full(500, 2.5)) == pytest.approx(np.full(500, 2.5))
    assert smooth(np.array([1.0, 3.0])).tolist() == [1.0, 3.0]  # too few to smooth
    jump = smooth(np.repeat([0.0, 1.0], 500))  # weights fall to 1/e within 1/50 of the run
    assert jump[500 + 19] == pytest.approx(1 - math.exp(-1), abs=0.02)


def test_events_of_a_new_run_begin_anew(tmp_path: Path) -> None:
    for step in (0, 5, 0):
        add_event(tmp_path, "start", step, layout="dp 1 × tp 1")
    assert [json.loads(line)["step"] for line in (tmp_path / "events.jsonl").read_text().splitlines()] == [0]
    add_event(tmp_path / "nowhere", "start", 5)  # which ends no run


def test_settings_that_differ_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", lr=2e-3)
    page = report(capsys, one, two, output=tmp_path / "page.html")
    assert page.index("<th>optimizer.lr</th><td>0.001</td><td>0.002</td>") < page.index("<th>model.name</th>")
    assert "&lt;/script&gt;&amp;</pre>" in page


@needs_browser
def test_the_page_in_a_browser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", lr=2e-3, steps=60)
    report(capsys, one, two, output=tmp_path / "page.html")

    async def look(tab: Page) -> None:
        titles = await tab.evaluate("data.panels.map(panel => panel.title)")
        assert titles[0] == "Loss"
        assert titles[-1] == "experts_busiest"  # a figure that the report knows nothing of
        drawn = "document.getElementById('panel0')"
        marks = f"Object.fromEntries({drawn}.data.filter(t => t.mode == 'markers').map(t => [t.name, t.x]))"
        both = {"resumed": [20, 40] * 2, "layout changed": [40] * 2, "skipped": [30] * 2, "rewound": [60] * 2}
        assert await tab.evaluate(marks) == both | {"checkpoint": [20] * 2}
        # A click on a name in the legend hides its curve.
        curves = f"{drawn}.querySelectorAll('.scatterlayer .trace').length"
        before = await tab.evaluate(curves)
        middle = "(b => [b.x + b.width / 2, b.y + b.height / 2])"
        box = await tab.evaluate(f"{middle}({drawn}.querySelector('.legendtoggle').getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            await tab.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
        await tab.evaluate("new Promise(done => setTimeout(done, 1000))")
        assert await tab.evaluate(f"{drawn}.data[0].visible") == "legendonly"
        assert await tab.evaluate(curves) == before - 1
        # So does a run's box, and other axes move the marks.
        await tab.evaluate("document.querySelectorAll('[name=run]')[1].click()")
        assert await tab.evaluate(f"{drawn}.data.some(t => t.name.startsWith('two'))") is False
        await tab.evaluate("document.querySelectorAll('[name=axis]')[2].click()")
        assert (await tab.evaluate(marks))["resumed"] == pytest.approx([0.2, 0.4], abs=0.001)
        await tab.evaluate("document.querySelectorAll('[name=axis]')[1].click()")
        assert (await tab.evaluate(marks))["resumed"] == [20_000, 40_000]

    in_browser(tmp_path / "page.html", tmp_path / "profile", look)


@needs_browser
def test_it_fits_a_phone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, make_run(tmp_path / "run"), output=tmp_path / "page.html")

    async def look(tab: Page) -> None:
        assert await tab.evaluate("document.documentElement.scrollWidth") <= 400
        assert await tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 25, 29)"

    in_browser(tmp_path / "page.html", tmp_path / "profile", look, width=400, dark=True)


def test_held_out_sets_are_in_the_panels_of_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    names = ("val_loss", "val_loss/code", "val_perplexity/code", "val_accuracy/code", "val_bits_per_byte/code")
    lines = [{"step": 0} | dict.fromkeys(names, 2.0), {"step": 1, "loss": 3.0}, {"step": 1} | dict.fromkeys(names, 1.5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(capsys, folder, output=tmp_path / "page.html")
    panels = {panel["title"]: [curve["name"] for curve in panel["curves"]] for panel in data_of(page)["panels"]}
    assert panels["Loss"][-2:] == ["val_loss", "val_loss/code"]
    for what in ("Perplexity", "Accuracy", "Bits per byte"):
        assert panels[f"{what} of validation"] == [f"val_{what.lower().replace(' ', '_')}/code"]
    assert "<th>lowest val_loss/code</th><td>1.5000</td>" in page
