"""What a run prints on terminals of any width, into a pipe, and with NO_COLOR."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import pytest
from rich.console import Console

from torchtitan_style.metrics.display import Display

STEP = {
    "step": 150, "loss": 3.14159, "grad_norm": 1.2, "lr": 3e-4, "tokens_per_second": 12345.0, "mfu": 0.34,
    "peak_memory_gib": 12.3,
}  # fmt: skip
ALONE = {"val_loss": 3.0, "val_perplexity": 1220.0, "val_accuracy": 0.4}
SET = {"val_loss/code": 2.0, "val_perplexity/code": 7.0, "val_accuracy/code": 0.05, "val_bits_per_byte/code": 1.2}
WHOLE = (
    "step  150/2000  loss  3.1416  grad norm  1.200  lr 3.00e-04     12,345 tokens/s  MFU 34.0%  12.30 GiB  "
    "1:06:40 left"
)


def printed(monkeypatch: pytest.MonkeyPatch, *, bar: bool = False, **options: Any) -> str:
    """What a display writes, with the codes that control a terminal."""
    file = io.StringIO()
    display = Display(is_main=True)
    monkeypatch.setattr(display, "_console", Console(file=file, highlight=False, soft_wrap=True, **options))
    if bar:
        display.start(0, 2000)
    display.step(STEP, steps=2000, seconds_left=4000.0)
    display.validation(150, ALONE, best="val_loss")
    display.validation(150, ALONE | SET, best="val_loss/code")
    if bar and display._progress:
        display._progress.refresh()
    display.stop()
    return file.getvalue()


def test_lines_in_a_pipe_are_plain_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, bar=True, width=40).splitlines() == [
        WHOLE,
        "validation at step 150: loss 3.0000, perplexity 1,220.00, accuracy 40.0% (best so far)",
        "validation at step 150",
        "  corpus  loss 3.0000, perplexity 1,220.00, accuracy 40.0%",
        "  code    loss 2.0000, perplexity     7.00, accuracy  5.0%, 1.2000 bits/byte (best so far)",
    ]


@pytest.mark.parametrize("width", [120, 100, 80, 60, 50])
def test_lines_fit_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    text = printed(monkeypatch, force_terminal=True, width=width)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()
    assert len(lines) == 5
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("step  150/2000  loss  3.1416")
    assert (lines[0] == WHOLE) == (width >= len(WHOLE))
    assert ["best so far" in line for line in lines] == [False, True, False, False, True]
    assert all("loss" in line for line in (lines[1], *lines[3:]))
    for field in ("perplexity", "accuracy"):
        assert lines[3].find(field) == lines[4].find(field)  # one below the other, or neither


def test_samples_are_indented(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " loss(x):\n    return the [bold]mean[/] of \x1b[2Jall"
    for options, lines in {
        "pipe": ["    def loss(x):", "        return the [bold]mean[/] of \x1b[2Jall"],
        "terminal": ["    def loss(x):", "        return the", "    [bold]mean[/] of", "    �[2Jall"],
    }.items():
        file = io.StringIO()
        display = Display(is_main=True)
        console = Console(file=file, highlight=False, soft_wrap=True, width=20, force_terminal=options == "terminal")
        monkeypatch.setattr(display, "_console", console)
        display.sample("def", text)
        text_only = re.sub(r"\x1b\[[0-9;?]*m", "", file.getvalue())
        assert [line.rstrip() for line in text_only.splitlines()] == lines


@pytest.mark.parametrize("width", [120, 60, 40])
def test_the_bar_has_loss_and_time_left(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    text = printed(monkeypatch, bar=True, force_terminal=True, width=width)
    bars = [line for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)) if "0/2000 " in line]
    assert re.search(r" 0/2000 (0:00:0\d )?loss 3\.1416 1:06:40 left", bars[-1])
    assert len(bars[-1].rstrip()) <= width


def test_the_bar_says_that_the_run_validates(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    display = Display(is_main=True)
    monkeypatch.setattr(display, "_console", Console(file=file, highlight=False, force_terminal=True, width=60))
    with display.doing("validating"):  # without a bar it says nothing
        pass
    display.start(0, 2000)
    display.step(STEP, steps=2000, seconds_left=4000.0)
    bars = []
    for context in (display.doing("validating"), contextlib.nullcontext()):
        with context:
            file.truncate(0)
            display._progress.refresh()
            bars.append(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()))
    display.stop()
    assert "validating" in bars[0]
    assert "left" not in bars[0]
    assert "1:06:40 left" in bars[1]


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    colored = r"\x1b\[[0-9;]*3[0-9]"
    assert re.search(colored, printed(monkeypatch, bar=True, force_terminal=True, width=120, color_system="256"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(colored, printed(monkeypatch, bar=True, force_terminal=True, width=120, color_system="256"))
