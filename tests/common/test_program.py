"""Standard streams that are closed, broken or of a narrow encoding, and what Ctrl-C ends."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT
from tests.faults.runs import write_corpus
from torchtitan_style.checkpoint.folder import CheckpointFolder

NARROW = {"PYTHONIOENCODING": "ascii:strict"}
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

ALL_WRITERS = """
import argparse, logging, sys, warnings
from torchtitan_style.common.program import begin
begin()
from rich.console import Console
from rich.progress import track
print("2 × 学习 \\udcff")
print("2 × 学习 \\udcff", file=sys.stderr)
Console().print("2 × 学习")
list(track([1], "loss …", console=Console(force_terminal=True, width=60)))
warnings.warn("2 × 学习")
logging.warning("2 × 学习")
argparse.ArgumentParser(prog="×").print_help()
"""


def shell(line: str, *, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """``python`` in ``line`` is this interpreter."""
    line = line.replace("python", sys.executable)
    env = ENVIRONMENT | (environment or {})
    return subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, errors="replace", check=False)


@pytest.mark.parametrize("environment", [NARROW, C_LOCALE, {"PYTHONIOENCODING": "latin-1"}], ids=str)
def test_what_an_encoding_lacks_is_replaced_whoever_writes(environment: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ALL_WRITERS, encoding="utf-8")
    done = shell(f"python {script}", environment=environment)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    assert done.stderr.count("??") == 4  # print, warnings with its line of source, logging
    assert "100%" in done.stdout
    assert "-" * 20 in done.stdout  # the bar is drawn with what there is


@pytest.mark.parametrize("environment", [NARROW, C_LOCALE], ids=str)
@pytest.mark.parametrize("arguments", ["--help", "--help training"])
def test_help_is_shown_in_any_encoding(arguments: str, environment: dict[str, str]) -> None:
    done = shell(f"python -m torchtitan_style {arguments}", environment=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout) > 1000


def test_files_do_not_get_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    script, file = tmp_path / "script.py", tmp_path / "file"
    script.write_text(
        "import os, subprocess, sys\nfrom torchtitan_style.common.program import begin\nbegin()\n"
        f"file = open({str(file)!r}, 'w')\nassert file.fileno() > 2\n"
        "print('out'); print('err', file=sys.stderr); os.write(1, b'out'); sys.stdin.read()\n"
        "subprocess.run([sys.executable, '-c', 'import sys; sys.exit(sys.stdout is None or sys.stdin is None)'], "
        "check=True)\n"
    )
    assert shell(f"python {script} <&- >&- 2>&-").returncode == 0
    assert file.read_text() == ""


WRITES = """
import sys
from torchtitan_style.common.program import begin, delivering_output
begin(output_matters={matters})
with delivering_output():
    for _ in range(3):
        print("x" * 100_000)
        print("y", file=sys.stderr)
    open({mark!r}, "w").close()
"""


@pytest.mark.parametrize("buffering", ["", "-u"])
@pytest.mark.parametrize(
    "where", [">/dev/full", ">/dev/full 2>/dev/full", "| true", "2>&1 | true", ">&-", "1</dev/null"]
)
def test_a_program_that_does_more_than_print_goes_on_without_its_streams(
    where: str, buffering: str, tmp_path: Path
) -> None:
    script, mark = tmp_path / "script.py", tmp_path / "mark"
    script.write_text(WRITES.format(matters=False, mark=str(mark)))
    done = shell(f"set -o pipefail; python {buffering} {script} {where}")
    assert done.returncode == 0, done.stderr
    assert mark.exists()
    assert done.stderr in ("y\ny\ny\n", "")


@pytest.mark.parametrize("buffering", ["", "-u"])
@pytest.mark.parametrize(("where", "status", "message"), [
    ("| true", 128 + signal.SIGPIPE, ""),
    (">/dev/full", 1, "error: standard output: No space left on device\n"),
])  # fmt: skip
def test_a_program_that_is_there_to_print_ends_without_a_reader(
    where: str, status: int, message: str, buffering: str, tmp_path: Path
) -> None:
    script, mark = tmp_path / "script.py", tmp_path / "mark"
    script.write_text(WRITES.format(matters=True, mark=str(mark)))
    done = shell(f"set -o pipefail; python {buffering} {script} {where}")
    assert done.returncode == status
    assert done.stderr == message
    assert not mark.exists()


@pytest.mark.parametrize(
    "line", ["torchtitan_style --help", "torchtitan_style --help model", "torchtitan_style.launch -h"]
)
def test_help_without_a_reader_ends_as_other_programs_do(line: str) -> None:
    done = shell(f"set -o pipefail; python -m {line} | true")
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    done = shell(f"python -m {line} > /dev/full")
    assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")


def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path: Path) -> None:
    """An exception in the middle of it would end in an abort."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\nfrom torchtitan_style.common.program import begin_command\nbegin_command()\n"
        "class Finder:\n    def find_spec(self, name, *_):\n"
        "        if name == 'torch._utils': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\nimport torch\n"
    )
    # Not through a shell: what it starts in the background ignores Ctrl-C.
    done = subprocess.run([sys.executable, str(script)], env=ENVIRONMENT, capture_output=True, text=True, check=False,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize(("nproc", "where"), [(1, ">/dev/full <&- 2>&-"), (2, "<&- 2>&- | true")])
def test_a_run_trains_to_its_end_whatever_becomes_of_its_output(tmp_path: Path, nproc: int, where: str) -> None:
    """And though the encoding lacks what is printed: the header of several processes, and samples of any text."""
    write_corpus(tmp_path)
    run = tmp_path / "run"
    options = f"--job.dump_folder {run} --training.steps 2 --validation.enable false --generation.enable true"
    environment = NARROW | {"NPROC": str(nproc)}
    line = f"set -o pipefail; python -m torchtitan_style.launch --config {tmp_path}/config.toml {options} {where}"
    assert shell(line, environment=environment).returncode == 0
    assert CheckpointFolder(run / "checkpoint").problem(2) is None


def test_a_line_is_written_when_it_is_printed_to_a_pipe_too() -> None:
    """A program that waits for hours, as for another that prepares the same data, has said so."""
    code = (
        "import sys; from torchtitan_style.common.program import begin; begin(); print('waiting'); sys.stdin.readline()"
    )
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as process:
        said, _, _ = select.select([process.stdout], [], [], 60)
        assert said
        assert process.stdout.readline() == b"waiting\n"
        process.communicate(b"\n")
