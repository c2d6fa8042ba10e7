"""``tests/run.sh`` and ``run_train.sh``: which environment they make and use, with stand-ins for what installs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTEST = "-m pytest -n 2 --dist loadfile --no-loadscope-reorder -k rows"

# Stands in for uv: notes its arguments, and "makes" an environment whose Python notes its own.
UV = """#!/usr/bin/env bash
echo "uv $*" >>"$LOG"
if [[ "$1" == venv ]]; then
    mkdir -p "${@: -1}/bin"
    printf '#!/bin/sh\\necho "python $0 $*" >>"$LOG"\\n' >"${@: -1}/bin/python"
    chmod +x "${@: -1}/bin/python"
else
    grep ^torch== "$6" >>"$LOG"
fi
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("run_train.sh", "constraints.txt", "pyproject.toml", "tests/run.sh"):
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "checkout" / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/uv").write_text(UV)
    (tmp_path / "bin/uv").chmod(0o755)
    return tmp_path / "checkout"


def run(checkout: Path, **environment: str) -> list[str]:
    """Run tests/run.sh; returns what was started, with the checkout as "."."""
    log = checkout.parent / "log"
    log.write_text("")
    path = f"{checkout.parent / 'bin'}:{os.environ['PATH']}"
    command = [str(checkout / "tests/run.sh"), "-k", "rows"]
    subprocess.run(command, env=os.environ | {"PATH": path, "LOG": str(log)} | environment, check=True, timeout=60)
    return [line.replace(str(checkout), ".") for line in log.read_text().splitlines()]


def test_another_torch_gets_an_environment_of_its_own(checkout: Path) -> None:
    lines = run(checkout, TORCH="2.14.1")
    python = "./.venv-torch-2.14.1/bin/python"
    assert lines[0].startswith("uv venv --python ")
    assert lines[0].endswith(" ./.venv-torch-2.14.1")
    constraints = "./.venv-torch-2.14.1.txt"
    assert lines[1] == f"uv pip install --python {python} --constraint {constraints} --editable .[dev]"
    assert lines[2:] == ["torch==2.14.1", f"python {python} {PYTEST}"]
    assert run(checkout, TORCH="2.14.1") == lines[3:]  # installed once
    assert not (checkout / ".venv").exists()


def test_the_default_environment_has_the_tested_torch(checkout: Path) -> None:
    lines = run(checkout)
    python = "./.venv/bin/python"
    assert lines[1] == f"uv pip install --python {python} --constraint ./constraints.txt --editable .[dev]"
    assert "torch==2.14.1" not in lines
    assert f"python {python} -m mypy" in lines
    assert lines[-1] == f"python {python} {PYTEST}"


def test_an_active_environment_with_everything_is_used_but_not_for_another_torch(checkout: Path) -> None:
    active = checkout.parent / "bin/python3"
    active.write_text('#!/bin/sh\necho "python $0 $*" >>"$LOG"\n')
    active.chmod(0o755)
    assert run(checkout)[-1] == f"python {active} {PYTEST}"
    assert run(checkout, TORCH="2.11.0")[-1].startswith("python ./.venv-torch-2.11.0/bin/python -m pytest ")
