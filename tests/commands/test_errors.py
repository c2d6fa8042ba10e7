"""Errors of several ranks at once: one message, whichever rank is the first to end."""

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


@pytest.mark.parametrize("delays", [(1.5, 0, 0), (0, 1.5, 1.5)], ids=["the first is late", "the others are late"])
@pytest.mark.parametrize(("kind", "status"), [("UserError", 2), ("RunError", 1)])
def test_an_error_of_all_ranks_is_one_message(
    python: Python, tmp_path: Path, delays: tuple[float, ...], kind: str, status: int
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(delays=delays, kind=kind), encoding="utf-8")
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", script, timeout=60)
    assert done.stderr.count("error: the model has no layers\n") == 1, done.stderr
    if delays[0] == 1.5:  # the others were there, with nothing to say; torchrun then tells them to end
        assert done.stderr.count(f"exitcode  : {status} ") == 3, done.stderr
    assert "cli.py" not in done.stderr  # in no traceback but torchrun's own


ONE = """
import os, time
from torchtitan_style.common import reporting as cli
from torchtitan_style.common.errors import UserError

cli._PATIENCE = 1
with cli.reported_errors():
    if os.environ["RANK"] == "1":
        raise UserError("this GPU has no room")
    time.sleep(30)  # as in a collective
"""


def test_an_error_that_others_do_not_have_is_said_by_the_one_that_has_it(python: Python, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(ONE, encoding="utf-8")
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, timeout=60)
    assert done.stderr.count("error: this GPU has no room\n") == 1, done.stderr
