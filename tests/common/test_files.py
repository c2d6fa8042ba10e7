"""Folders that are made for something, and what becomes of them if it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import first_missing, nearest_existing, new_folder
from torchtitan_style.config.schema import Data
from torchtitan_style.data.prepare.store import CorpusStore
from torchtitan_style.launch.run_lock import run_lock


def fail_in_a_lock(folder: Path) -> None:
    with run_lock(folder):
        (folder.parent / "other").mkdir()  # as another run does, which has begun meanwhile
        (folder.parent / "other" / "file").touch()
        raise UserError("wrong")


def fail_in_a_new_folder(folder: Path) -> None:
    with new_folder(folder) as temporary:
        (temporary / "part").touch()
        (folder.parent / "other").mkdir()
        (folder.parent / "other" / "file").touch()
        raise UserError("wrong")


def fail_to_prepare(folder: Path) -> None:
    def say(_line: str) -> None:
        (folder.parent / "other").mkdir(exist_ok=True)
        (folder.parent / "other" / "file").touch()

    text = folder.parent.parent / "text.txt"
    text.write_text("too short")

    config = Data(dataset="files", paths=[str(text)])
    CorpusStore(config, folder, vocab_size=300, seq_len=1000).get(say=say)


@pytest.mark.parametrize("fail", [fail_in_a_lock, fail_in_a_new_folder, fail_to_prepare])
def test_what_others_have_put_beside_it_stays(fail, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"wrong|has only .* tokens"):
        fail(tmp_path / "outputs" / "mine")
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["other"]
    assert (tmp_path / "outputs" / "other" / "file").exists()


def test_nothing_stays_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wrong"), new_folder(tmp_path / "a" / "b" / "c"):
        raise UserError("wrong")
    with pytest.raises(UserError, match="wrong"), run_lock(tmp_path / "a" / "b"):
        raise UserError("wrong")
    assert not any(tmp_path.iterdir())


def test_the_nearest_existing_folder_and_the_first_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "a" / "b" / "c"
    assert nearest_existing(deep) == tmp_path
    assert first_missing(deep) == tmp_path / "a"
    assert nearest_existing(tmp_path) == tmp_path
    assert first_missing(tmp_path) is None
    monkeypatch.chdir(tmp_path)
    assert nearest_existing(Path("a/b")).resolve() == tmp_path
    assert first_missing(Path("a/b")) == Path("a")
