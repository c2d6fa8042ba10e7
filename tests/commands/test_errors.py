"""Errors of several ranks under a bare torchrun: one message, whichever rank is the first to fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Python

RANK = """
import os, time
from torchtitan_style.common.reporting import reported_errors
from torchtitan_style.common.errors import RunError, UserError
from torchtitan_style.train.stopping import interruptible

with reported_errors(), interruptible():
    time.sleep({delays}[int(os.environ["RANK"])])
    raise {kind}("the model has no layers")
"""


@pytest.mark.parametrize(
    ("delays", "kind", "status"),
    [((1.5, 0, 0), "UserError", 2), ((0, 0, 0), "RunError", 1), ((30, 0, 30), "UserError", 2)],
    ids=["the first is late", "all at once", "one alone"],
)
def test_an_error_is_one_message(
    python: Python, tmp_path: Path, delays: tuple[float, ...], kind: str, status: int
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(delays=delays, kind=kind), encoding="utf-8")
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", script, timeout=60)
    assert done.stderr.count("error: the model has no layers\n") == 1, done.stderr
    assert f"exitcode  : {status} " in done.stderr  # torchrun's own report
    assert "reporting.py" not in done.stderr  # in no traceback but torchrun's own
