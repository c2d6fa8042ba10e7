"""docs/tour.md: the calls that it lists are those of a run, in that order."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
[SHOW_STACK] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)

# The calls of the second step, each once.
SHOW_CALLS = """
import sys
from pathlib import Path

import torchtitan_style
from torchtitan_style.train.trainer import Trainer

root = str(Path(torchtitan_style.__file__).parent) + "/"
train_step, seen, steps = Trainer._train_step, [], []


def note(frame, event, _):
    file, name = frame.f_code.co_filename, getattr(frame.f_code, "co_qualname", "")
    if event == "call" and file.startswith(root) and (file, name) not in seen:
        seen.append((file, name))


def traced(trainer):
    steps.append(1)
    if len(steps) != 2:
        return train_step(trainer)
    sys.setprofile(note)
    try:
        return train_step(trainer)
    finally:
        sys.setprofile(None)
        for file, name in seen:
            print("CALL", file.removeprefix(root), name)


Trainer._train_step = traced
"""


def listed(heading: str) -> list[tuple[str, str]]:
    """File and function of each line of the block below a heading that has such lines."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    block = re.findall(r"^```\n(.*?)^```", section, flags=re.S | re.M)[0]
    return [tuple(line.split()) for line in block.splitlines()]


@pytest.fixture(scope="module")
def run(launch, tmp_path_factory) -> str:
    folder: Path = tmp_path_factory.mktemp("tour")
    (folder / "show_stack.py").write_text(SHOW_STACK)
    (folder / "show_calls.py").write_text(SHOW_CALLS)
    (folder / "corpus.txt").write_text("one document after another " * 400)
    line = "--model.flavor debug --model.vocab_size 512 --training.steps 2 --training.seq_len 32 --data.dataset files"
    line += " --data.paths corpus.txt --validation.enable false --generation.enable false --checkpoint.enable false"
    line += " --job.custom_import show_stack show_calls"
    done = launch(*line.split(), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_stack(run: str) -> None:
    frames = re.findall(r'File ".*?/torchtitan_style/(.*?)", line \d+, in (\S+)', run)
    expected = [(file, name.rpartition(".")[2]) for file, name in listed("The call stack")]
    assert expected[-1] == ("optim/adamw.py", "step_if")  # called by the last one that is printed, as test_calls shows
    assert frames == expected[:-2]  # the module has taken the place of Optimizers.step_if


@pytest.mark.skipif(sys.version_info < (3, 11), reason="frames do not know the classes of methods")
def test_calls(run: str) -> None:
    calls = [tuple(line.split()[1:]) for line in run.splitlines() if line.startswith("CALL ")]
    expected = listed("One step")
    assert [call for call in calls if call in expected] == expected
