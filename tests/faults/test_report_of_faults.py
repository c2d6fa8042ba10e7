"""The report of a real run: two resumes, one of them in another layout, and a step that was skipped."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.faults.runs import Runs, records
from tests.report.browser import CHROMIUM, opened
from torchtitan_style.__main__ import main
from torchtitan_style.report.run import Run


def test_what_happened_is_marked(runs: Runs, tmp_path: Path) -> None:
    fault = {"kind": "nan_gradient", "rank": 0, "steps": [3]}
    options = ["--checkpoint.interval", 2, "--validation.freq", 4, "--generation.enable", "true"]
    folder = runs("run", *options, "--training.steps", 4, faults=[fault]).folder
    runs(folder, *options, "--training.steps", 6)
    runs(folder, *options, "--training.steps", 8, nproc=2)
    run = Run(folder, "run")
    found = [(kind, step) for kind, step, _ in run.marks]
    assert sorted(found) == sorted(
        [
            *(("checkpoint", step) for step in (2, 4, 6, 8)),
            ("resumed", 4), ("resumed", 6), ("layout changed", 6), ("skipped", 3),
        ]
    )  # fmt: skip
    assert records(folder, "skipped") == {3: True}
    assert run.steps.tolist() == list(range(1, 9))
    assert run.hours[0] > 0
    assert (run.hours[1:] >= run.hours[:-1]).all()
    assert [sample["step"] for sample in run.samples] == [4, 6, 8]
    assert run.unreadable == 0

    pytest.importorskip("plotly", reason="needs plotly, of the report extra")
    page = tmp_path / "page.html"
    main(["report", str(folder), "--output", str(page)])
    if CHROMIUM is None:
        pytest.skip("needs Chromium to open the report in")

    async def drawn() -> dict[str, list[int]]:
        async with opened(tmp_path / "profile") as tab:
            await tab.load(page, width=1000)
            traces = "document.getElementById('panel0').data.map(trace => [trace.name, trace.x])"
            found: dict[str, list[int]] = await tab.evaluate(f"Object.fromEntries({traces})")
            assert tab.complaints == []
            assert tab.requests == [page.as_uri()]
            return found

    shown = asyncio.run(drawn())
    kinds = {kind: sorted(step for other, step in found if other == kind) for kind, _ in found}
    assert shown == kinds | {"loss": list(range(1, 9)), "loss, smoothed": list(range(1, 9)), "val_loss": [0, 4, 6, 8]}
