"""Names that are no folder here: a mistyped path is not looked for on the Hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from torchtitan_style.checkpoint.saved import open_model
from torchtitan_style.commands.checkpoint import main as checkpoint_command
from torchtitan_style.common.errors import UserError
from torchtitan_style.common.hub import fetch
from torchtitan_style.config.schema import Corpus
from torchtitan_style.data.sources.corpus import _dataset_files
from torchtitan_style.data.tokenizer.tokenizer import copy_pretrained
from torchtitan_style.launch.configure import load_config


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the Hub is asked for, in a working folder with outputs/qwen3; there is no network."""
    names: list[str] = []

    def snapshot_download(name: str, **_options: object) -> str:
        names.append(name)
        raise LocalEntryNotFoundError("Got: ConnectError") from ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "outputs" / "qwen3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return names


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("./outputs/qwen4", "there is no folder ./outputs/qwen4; did you mean outputs/qwen3?"),
        ("outputs/qwen3/checkpoint", "there is no folder outputs/qwen3/checkpoint"),
        ("outputs/runs/qwen3", "there is no folder outputs/runs/qwen3"),
        ("tokenizer.json", "there is no folder tokenizer.json"),
        ("folder/model.safetensors", "there is no folder folder/model.safetensors"),
    ],
)
def test_what_looks_like_a_path_is_not_asked_for(asked: list[str], source: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        fetch(source, weights=False)
    assert str(caught.value) == said
    assert asked == []


@pytest.mark.parametrize("source", ["Qwen/Qwen3-0.6B", "gpt2", "Qwen/Qwen2.5-7B"])
def test_names_of_the_hub_are_asked_for(asked: list[str], source: str) -> None:
    said = f"there is no folder {source} here, and it could not be fetched .*: no network; .* name a folder"
    with pytest.raises(UserError, match=said):
        fetch(source, weights=False)
    assert asked == [source]


def test_a_dataset_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset_builder(name: str, *_options: object) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset_builder", load_dataset_builder)
    with pytest.raises(UserError) as caught:
        _dataset_files(Corpus(dataset="owner/name"))
    assert str(caught.value) == 'data.dataset: "owner/name": the Hub cannot be reached, and its cache here has no copy'


@pytest.mark.parametrize("source", ["outputs/qwen4", "output/qwen3", "output"])
def test_a_name_like_that_of_a_folder_is_said_to_be_one(asked: list[str], source: str) -> None:
    for use in (
        lambda: fetch(source, weights=True),
        lambda: open_model(source, verify=False),
        lambda: copy_pretrained(source, Path("tokenizer")),
    ):
        with pytest.raises(UserError) as caught:
            use()
        there = "outputs" if source == "output" else "outputs/qwen3"
        assert str(caught.value) == f"there is no folder {source}; did you mean {there}?"


def test_the_checkpoint_command_says_so_too(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        checkpoint_command(["list", "outputs/qwen"])
    assert capsys.readouterr().err == "error: outputs/qwen: there is no such folder; did you mean outputs/qwen3?\n"


@pytest.mark.parametrize("name", ["a.txt", "my/a.jsonl", "./*.parquet", "corpus", "https://host/a.txt"])
def test_a_file_as_dataset_is_pointed_to_files(asked: list[str], name: str) -> None:
    Path("corpus").touch()
    with pytest.raises(UserError) as caught:
        load_config("qwen3", ["--data.dataset", name])
    assert f'set dataset = "files" and paths = ["{name}"]' in str(caught.value)


def test_a_mistyped_folder_as_dataset_is_said_to_be_one(asked: list[str]) -> None:
    with pytest.raises(UserError, match=r'data.dataset: "\./output": there is no such folder; did you mean outputs\?'):
        _dataset_files(Corpus(dataset="./output"))
