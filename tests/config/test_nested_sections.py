"""Sections within sections, as [optimizer.muon], read, overridden and reported like any other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from torchtitan_style.__main__ import usage
from torchtitan_style.common.errors import UserError
from torchtitan_style.config import to_toml
from torchtitan_style.config.schema import Config, Optimizer, sections_of
from torchtitan_style.launch.configure import help_of, load_config


def load(tmp_path: Path, text: str, *overrides: str):
    path = tmp_path / "config.toml"
    path.write_text(text)
    return load_config(path, overrides)


def test_from_file_and_command_line(tmp_path: Path) -> None:
    text = '[optimizer]\nname = "muon"\n[optimizer.muon]\nlr = 0.02\nmomentum = 0.9\n'
    config = load(tmp_path, text, "--optimizer.muon.lr", "0.03", "--optimizer.muon.nesterov=false")
    assert config.optimizer.muon.lr == 0.03
    assert config.optimizer.muon.momentum == 0.9
    assert config.optimizer.muon.nesterov is False
    again = load(tmp_path, to_toml(config))
    assert again == config


def test_another_optimizer_from_the_command_line_needs_no_settings_of_the_files(tmp_path: Path) -> None:
    file = '[optimizer]\nname = "muon"\n[optimizer.muon]\nlr = 0.1'
    assert load(tmp_path, file, "--optimizer.name", "adamw").optimizer == Optimizer(name="adamw")
    assert load(tmp_path, file, "--optimizer.name", "muon").optimizer.muon_lr == 0.1
    with pytest.raises(UserError, match="is only read with"):
        load(tmp_path, file, "--optimizer.name", "adamw", "--optimizer.muon.lr", "0.2")


def test_a_list_from_the_command_line(tmp_path: Path) -> None:
    assert load(tmp_path, "", "--optimizer.no_decay", "*embed*", "*head*").optimizer.no_decay == ["*embed*", "*head*"]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("[optimizer.muon]\nlearning_rate = 1", [], r"config\.toml: optimizer\.muon\.learning_rate: unknown key"),
        ("[optimizer.muon]\nmomentun = 1", [], r"did you mean optimizer\.muon\.momentum\?"),
        ("[optimizer.muon]\nmomentum = 1.0", [], r"optimizer\.muon\.momentum: must be less than 1"),
        ("[optimizer.muon]\nnormuon_beta2 = 1", [], r"optimizer\.muon\.normuon_beta2: must be less than 1"),
        ("[optimizer.muon]\nns_steps = 0", [], r"optimizer\.muon\.ns_steps: must be at least 1, not 0"),
        ('[optimizer.muon]\nlr = "high"', [], r'optimizer\.muon\.lr: must be a number, not "high"'),
        ("optimizer = {muon = 3}", [], r"optimizer\.muon: must be a section of keys"),
        ("", ["--optimizer.muon.adjust_lr", "orignal"], r"--optimizer\.muon\.adjust_lr: .*did you mean original"),
        ("", ["--optimizer.mun.lr", "1"], r"--optimizer\.mun\.lr: unknown section; did you mean optimizer\.muon\?"),
        ("", ["--muon.lr", "1"], r"unknown section"),
        ("", ["--optimizer.muon", "1"], r"--optimizer\.muon: unknown key"),
        ("", ["--optimizer.muon.lr", "0.1"], r'--optimizer\.muon\.lr: is only read with optimizer\.name = "muon"'),
        ("[optimizer]\nmuon = 3", ["--optimizer.muon.lr", "0.1"], r"optimizer\.muon"),
    ],
)  # fmt: skip
def test_a_mistake_names_the_whole_key(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, text, *overrides)


def test_help() -> None:
    listed = usage().partition("Sections:")[2].partition("\n\n")[0]
    assert re.findall(r"[\w.]+", listed) == list(sections_of(Config))
    assert "optimizer.muon.ns_steps = 5" in help_of("optimizer.muon")
    assert "Steps of the Newton-Schulz iteration" in help_of("optimizer.muon.ns_steps")
    assert "--help optimizer.muon" in help_of("optimizer")
