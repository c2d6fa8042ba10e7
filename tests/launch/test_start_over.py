"""A program that trains has the settings of the C library's allocator that count from a process's start only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan_style.cpu.memory import TUNABLES

# glibc puts a zero byte for a colon as it reads its settings.
PROBE = """
started_with = open("/proc/self/environ").read().replace("\\0", ":")
raise ImportError(started_with[started_with.index("GLIBC_TUNABLES=") :])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("program", [("torchtitan_style.launch",), ("torchtitan_style", "train")])
@pytest.mark.parametrize("own", [None, "glibc.malloc.check=0"])
def test_a_run_has_them_unless_the_user_has_others(program: tuple[str, ...], own: str | None, tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    environment = {key: value for key, value in os.environ.items() if key != TUNABLES[0]}
    environment |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])}
    if own:
        environment[TUNABLES[0]] = own
    command = [sys.executable, "-m", *program, "--job.custom_import", "probe"]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert f"GLIBC_TUNABLES={own or TUNABLES[1]}:" in ended.stderr


def test_a_program_of_another_name_goes_on_as_it_is(tmp_path: Path) -> None:
    """A debugger, say, that runs the package within itself."""
    code = "from torchtitan_style.common.program import start_over_with as f; f('PROBE', '1'); import os; "
    script = tmp_path / "debugger.py"
    script.write_text(code + "print('PROBE' in os.environ)\n")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for command in ([str(script)], ["-c", script.read_text()]):
        ended = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=True)
        assert ended.stdout == "False\n"
