"""The documentation as a website: mkdocs builds it without a warning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def test_the_site_is_built(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason='mkdocs is not installed; pip install -e ".[docs]" installs it')
    pytest.importorskip("material", reason='mkdocs-material is not installed; pip install -e ".[docs]" installs it')
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/learn/tensor_parallel.html").read_text(encoding="utf-8")
    assert 'id="the-gradient-of-an-rmsnorm-weight"' in page
