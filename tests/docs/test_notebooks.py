"""docs/notebooks: they are what their scripts give, and run from the first cell to the last."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, ROOT

FOLDER = ROOT / "docs/notebooks"
MAKE = runpy.run_path(str(FOLDER / "make.py"))
NAMES = MAKE["NAMES"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_script_gives(name: str) -> None:
    made = MAKE["notebook"]((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    kept = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert kept == made, "python docs/notebooks/make.py"
    assert all(not cell.get("outputs") for cell in json.loads(kept)["cells"])


@pytest.mark.nightly
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason='nbclient is not installed; pip install -e ".[docs]" installs it')
    pytest.importorskip("ipykernel", reason='ipykernel is not installed; pip install -e ".[docs]" installs it')
    nbformat = pytest.importorskip("nbformat")
    for key in ("PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(key, ENVIRONMENT[key])
    content = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(content, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [output for cell in content.cells for output in cell.get("outputs", [])]
    assert printed
