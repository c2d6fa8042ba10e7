"""docs/config_reference.md is what the schema gives."""

from __future__ import annotations

import runpy

from tests.conftest import ROOT


def test_the_reference_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs/make_reference.py"))["reference"]()
    kept = (ROOT / "docs/config_reference.md").read_text(encoding="utf-8")
    assert kept == made, "python docs/make_reference.py > docs/config_reference.md"
    assert "| `steps` | `1000` | whole number | Total optimizer steps. |" in made
