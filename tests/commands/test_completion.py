"""What the shell is offered behind an incomplete command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONSOLE = "from torchtitan_style.__main__ import console; console()"


@pytest.mark.parametrize(
    ("line", "offered", "others"),
    [
        ("torchtitan-style ", {"train", "import-hf", "--help"}, {"--config"}),
        ("torchtitan-style plan --", {"--world-size", "--training.steps"}, {"--training", "--prompt"}),
        ("torchtitan-style train --config qwen3_8", {"qwen3_8b", "qwen3_8b_lora"}, {"qwen3"}),
        ("torchtitan-style train --dry-run --model.flavor ", {"debug", "30B-A3B"}, {"--config", "qwen3"}),
        ("torchtitan-style prepare --data.streaming ", {"true", "false"}, {"train"}),
        ("torchtitan-style checkpoint ", {"list", "verify"}, {"--training.steps", "train"}),
        ("torchtitan-style eval --format=c", {"chat"}, {"text"}),
    ],
)
def test_what_may_come_next_is_offered(line: str, offered: set[str], others: set[str], tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    subprocess.run(
        [sys.executable, "-c", CONSOLE],
        env=os.environ
        | {
            # As the function that register-python-argcomplete defines in bash sets them.
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_IFS": "\n",
            "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:",
            "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
        },
        capture_output=True,
        check=True,
        timeout=60,
    )
    found = set(answer.read_text(encoding="utf-8").replace(" ", "").split("\n"))
    assert found >= offered
    assert not found & others
