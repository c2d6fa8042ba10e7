"""Finding and reading configuration files."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchtitan_style.common.errors import UserError
from torchtitan_style.config.files import CONFIG_FOLDER, find_config
from torchtitan_style.launch.configure import load_config


def test_a_shipped_configuration_has_a_name_and_a_file_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("qwen3_8b") == find_config("qwen3_8b.toml") == CONFIG_FOLDER / "qwen3_8b.toml"
    assert load_config("qwen3_1.7b").model.flavor == "1.7B"  # .7b is no ending of a file
    assert find_config("else/qwen3_8b.toml") == Path("else/qwen3_8b.toml")
    with pytest.raises(UserError, match=r"^qwen3_9b: there is no such config file; did you mean qwen3_8b\?$"):
        load_config("qwen3_9b")
    Path("qwen3_8b.toml").write_text("[training]\nsteps = 7\n")
    assert load_config("qwen3_8b").training.steps == load_config("qwen3_8b.toml").training.steps == 7
    with pytest.raises(UserError, match=r"qwen3_9b: there is no such config file; did you mean .*qwen3_8b\.toml\?"):
        load_config("qwen3_9b")


def test_a_byte_order_mark_is_not_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[training]\nsteps = 7\n", encoding="utf-8-sig")
    assert load_config(path).training.steps == 7


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[training]\nsteps = 3\n[training]\nseed = 1\n", "line 3, column 10: [training] is defined twice"),
        ("[training]\nsteps = 3\nsteps = 4\n", "steps is defined twice"),
        ("[training]\nsteps = 3\n[training.steps]\n", "[training.steps] is defined twice"),
        ("[job]\ndump_folder = outputs\n", "line 2, column 15: dump_folder has no valid value (text needs quotes;"),
        ("[compile]\nenable = True\n", "enable has no valid value (text needs quotes; true and false are lowercase)"),
        ('[job]\ndescription = "a', "at the end of the file"),
        ("[job\n", "line 1, column 5: Expected ']'"),
    ],
)
def test_bad_toml_is_said_in_a_users_words(tmp_path: Path, toml: str, said: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(toml)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert said in str(caught.value)
    assert "Cannot" not in str(caught.value)
