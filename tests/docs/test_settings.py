"""Every setting that a Markdown page names is one that there is, and every configuration and flavor too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from torchtitan_style.config.schema import sections_of
from torchtitan_style.models.registry import model_names, spec_of
from torchtitan_style.models.section import schema_of

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SCHEMAS = [sections_of(schema_of(spec_of(name))) for name in model_names()]
SECTIONS = SCHEMAS[0]
KEYS = {f"{section}.{key}" for schema in SCHEMAS for section, model in schema.items() for key in model.model_fields}

NO_SETTINGS = {
    # files and attributes
    *("config.toml", "config.json", "metrics.jsonl", "model.generate", "model.model", "model.safetensors"),
    # of torchtitan, Yuntun, and 0.1.0
    *("training.dataset", "training.dataset_path", "checkpoint.initial_load_in_hf", "debug.seed"),
    *("parallelism.tp_size", "parallelism.dp_size", "parallelism.pp_size", "compile.scope"),
}
"""What looks like a setting and is none."""


def named(text: str) -> Iterator[str]:
    """What looks like section.key, on the command line or as code."""
    for line in text.splitlines():
        if "unknown key" not in line:
            yield from re.findall(r"(?:--|`)((?:optimizer\.)?[a-z_]+\.[a-z_]+)(?=[ =`)]|$)", line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_exist(page: Path) -> None:
    found = {key for key in named(page.read_text(encoding="utf-8")) if key.partition(".")[0] in SECTIONS}
    assert sorted(found - NO_SETTINGS - KEYS) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configurations_and_flavors_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"--config (?:train_configs/)?(qwen3[\w.]*?)(?:\.toml)?(?=[ `\n)])", text):
        assert (ROOT / "train_configs" / f"{name}.toml").exists(), name
    flavors = {flavor for name in model_names() for flavor in spec_of(name).flavors}
    assert set(re.findall(r"--model\.flavor ([\w.-]+)", text)) <= flavors


def test_settings_are_found() -> None:
    assert [*named("--training.steps 3, `data.paths`; `optimizer.muon.lr`")] == [
        "training.steps",
        "data.paths",
        "optimizer.muon.lr",
    ]
