"""From Transformers' format to a checkpoint and back: weights bit for bit, tokenizer byte for byte, and a folder
that Transformers loads without a complaint. What cannot be done leaves one message and no files behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from tiny_hf import hf_model, write_tokenizer
from torch import Tensor

from tests.conftest import ENVIRONMENT, Python
from torchtitan_style.checkpoint import hf_export
from torchtitan_style.checkpoint.hf_export import export_hf
from torchtitan_style.checkpoint.hf_import import import_hf
from torchtitan_style.checkpoint.manifest import problem_of
from torchtitan_style.checkpoint.saved import SavedModel, open_model
from torchtitan_style.commands import export_hf as export_command
from torchtitan_style.common.errors import UserError
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer
from torchtitan_style.models.hf_folder import TOKENIZER_FILES, HFFolder

SINGLE, INDEX, HEAD = "model.safetensors", "model.safetensors.index.json", "lm_head.weight"
EMBEDDING, GATE = "model.embed_tokens.weight", "model.layers.1.mlp.gate_proj.weight"
PARTS = "200KB"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEXT = "don't 12345 gradients naïve e\u0301 <|im_start|>user\nhi<|im_end|>\n 学习🙂\t\tx  y <|endoftext|> of the"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied model in one file, with all that belongs to its tokenizer. Not to be changed."""
    folder = tmp_path_factory.mktemp("source") / "model"
    hf_model(tie_word_embeddings=False).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model, imported. Not to be changed."""
    folder = tmp_path_factory.mktemp("imported") / "checkpoint"
    import_hf(HFFolder(source), folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors in the safetensors of ``folder``, which may then be written over: old versions map the file."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: tensor.clone() for name, tensor in load_file(file).items()}
    return tensors


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(folder: Path, **options: Any) -> transformers.Qwen3ForCausalLM:
    """What Transformers makes of ``folder``, which must be neither more nor less than it wants."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", **options
    )
    assert {key: list(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")} == {
        "missing_keys": [], "unexpected_keys": [], "mismatched_keys": [],
    }  # fmt: skip
    assert isinstance(model, transformers.Qwen3ForCausalLM)
    return model.eval()


# There and back


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("parts", [None, PARTS], ids=["one file", "many files"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_there_and_back_every_bit_is_the_same(tmp_path: Path, tied: bool, parts: str | None, dtype) -> None:
    model = hf_model(tie_word_embeddings=tied).to(dtype)
    with torch.no_grad():  # what a conversion on the way might lose
        model.model.norm.weight[:2] = torch.tensor([-0.0, torch.finfo(dtype).tiny / 4])
    model.save_pretrained(tmp_path / "hf", **({"max_shard_size": parts} if parts else {}))
    assert (tmp_path / "hf" / INDEX).exists() == (parts is not None)

    advanced: list[int] = []
    import_hf(HFFolder(tmp_path / "hf"), tmp_path / "checkpoint", advance=advanced.append)
    export_hf(SavedModel(tmp_path / "checkpoint"), tmp_path / "back", max_shard_size=parts or "5GB")

    expected, found = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    assert_same_bits(found, expected)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert (HEAD in found) == (not tied)
    assert (tmp_path / "back" / INDEX).exists() == (parts is not None)
    assert sorted(advanced) == sorted(tensor.nbytes for tensor in expected.values())

    before, after = load(tmp_path / "hf", dtype="auto"), load(tmp_path / "back", dtype="auto")
    assert after.dtype == dtype
    assert (after.lm_head.weight is after.model.embed_tokens.weight) == tied
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(after(ids).logits, before(ids).logits)


def test_each_tensor_keeps_its_own_type(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "hf")
    expected = {n: t if "norm" in n else t.to(torch.bfloat16) for n, t in tensors_of(source).items()}
    save_file(expected, tmp_path / "hf" / SINGLE)
    import_hf(HFFolder(tmp_path / "hf"), tmp_path / "checkpoint")
    export_hf(SavedModel(tmp_path / "checkpoint"), tmp_path / "back", max_shard_size=PARTS)
    assert_same_bits(tensors_of(tmp_path / "back"), expected)


def test_a_second_copy_of_a_tied_embedding_is_left_out(tmp_path: Path) -> None:
    hf_model().save_pretrained(tmp_path / "hf")
    tensors = tensors_of(tmp_path / "hf")
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, tmp_path / "hf" / SINGLE)
    import_hf(HFFolder(tmp_path / "hf"), tmp_path / "checkpoint")
    for name, opened in (("imported", SavedModel(tmp_path / "checkpoint")), ("direct", HFFolder(tmp_path / "hf"))):
        export_hf(opened, tmp_path / name)
        assert_same_bits(tensors_of(tmp_path / name), tensors)
        load(tmp_path / name)


CONFIGS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True},
    "theta, eps, range": {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "initializer_range": 0.05},
    "dropout": {"attention_dropout": 0.1},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e5,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "attention_factor": 1.3,
        }
    },
    "window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "three layers, one key/value head": {"num_hidden_layers": 3, "num_key_value_heads": 1, "max_window_layers": 3},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_the_exported_config_says_what_the_imported_one_said(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = hf_model(**changes)
    model.save_pretrained(tmp_path / "hf")
    import_hf(HFFolder(tmp_path / "hf"), tmp_path / "checkpoint")
    export_hf(SavedModel(tmp_path / "checkpoint"), tmp_path / "back")

    before, after = (transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("hf", "back"))
    assert after == before | {"_name_or_path": str(tmp_path / "back")}
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["architectures"] == ["Qwen3ForCausalLM"]
    # Where Transformers before version 5 looks for it, and takes 10,000 if it is not there.
    assert written["rope_theta"] == before["rope_parameters"]["rope_theta"]
    if before["rope_parameters"]["rope_type"] == "yarn":
        assert written["rope_scaling"] | {"rope_theta": 1e5} == written["rope_parameters"]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "back")(ids).logits, model(ids).logits)


# Files of the export


@pytest.mark.parametrize("limit", [70_000, 200_000, 400_000])
def test_the_index_is_right_and_no_file_is_larger_than_allowed(checkpoint: Path, tmp_path: Path, limit: int) -> None:
    export_hf(SavedModel(checkpoint), tmp_path / "out", max_shard_size=f"{limit // 1000}KB")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert sorted(set(index["weight_map"].values())) == files
    total = 0
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert set(tensors) == {name for name, where in index["weight_map"].items() if where == file}
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1  # a tensor is not split
        total += size
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"]) == set(tensors_of(tmp_path / "out"))
    HFFolder(tmp_path / "out").check()


def test_one_file_where_it_fits(checkpoint: Path, tmp_path: Path) -> None:
    export_hf(SavedModel(checkpoint), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("model*")] == [SINGLE]


def test_others_may_read_what_they_may_read_of_any_new_file(checkpoint: Path, tmp_path: Path) -> None:
    export_hf(SavedModel(checkpoint), tmp_path / "hf")
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "hf").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize("stored", DTYPES.values(), ids=lambda dtype: f"from {dtype}")
@pytest.mark.parametrize("wanted", DTYPES.values(), ids=lambda dtype: f"to {dtype}")
def test_another_type_is_what_casting_gives(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    hf_model(tie_word_embeddings=False).to(stored).save_pretrained(tmp_path / "hf")
    import_hf(HFFolder(tmp_path / "hf"), tmp_path / "checkpoint")
    expected = {name: tensor.to(wanted) for name, tensor in tensors_of(tmp_path / "hf").items()}
    for name, opened in (("imported", SavedModel(tmp_path / "checkpoint")), ("direct", HFFolder(tmp_path / "hf"))):
        export_hf(opened, tmp_path / name, dtype=wanted, max_shard_size=PARTS)
        assert_same_bits(tensors_of(tmp_path / name), expected)
        assert transformers.AutoConfig.from_pretrained(tmp_path / name).dtype == wanted


@pytest.mark.parametrize("value", [70_000.0, -1e30])
def test_what_float16_cannot_hold_is_refused(source: Path, tmp_path: Path, value: float) -> None:
    shutil.copytree(source, tmp_path / "hf")
    tensors = tensors_of(source)
    tensors[GATE][3, 4] = value
    save_file(tensors, tmp_path / "hf" / SINGLE)
    with pytest.raises(UserError, match=f"float16: {GATE} has values that do not fit; use bfloat16"):
        export_hf(HFFolder(tmp_path / "hf"), tmp_path / "out", dtype=torch.float16, max_shard_size=PARTS)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    export_hf(HFFolder(tmp_path / "hf"), tmp_path / "out", dtype=torch.bfloat16)


# Tokenizer


@pytest.mark.parametrize("like_qwen", [False, True], ids=["plain", "like Qwen"])
def test_the_tokenizer_is_copied_byte_for_byte_and_gives_the_same_ids(tmp_path: Path, like_qwen: bool) -> None:
    hf_model().save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", like_qwen=like_qwen)
    import_hf(HFFolder(tmp_path / "hf"), tmp_path / "checkpoint")
    export_hf(SavedModel(tmp_path / "checkpoint"), tmp_path / "back")
    names = {name for name in TOKENIZER_FILES if (tmp_path / "hf" / name).exists()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in (tmp_path / "checkpoint" / "tokenizer").iterdir()} == names
    for name in names:
        expected = (tmp_path / "hf" / name).read_bytes()
        assert (tmp_path / "checkpoint" / "tokenizer" / name).read_bytes() == expected, name
        assert (tmp_path / "back" / name).read_bytes() == expected, name

    ours = Tokenizer(tmp_path / "back")
    before, after = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("hf", "back"))
    ids = ours.encode(TEXT)
    assert after(TEXT).input_ids == before(TEXT).input_ids == ids
    assert after.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert (after.eos_token_id, after.pad_token_id) == (before.eos_token_id, before.pad_token_id) == (2, 0)
    chat = [{"role": "user", "content": "why?"}]
    texts = [t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for t in (before, after)]
    assert texts == ["<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"] * 2


def test_generation_stops_where_the_source_says(checkpoint: Path, source: Path, tmp_path: Path) -> None:
    export_hf(SavedModel(checkpoint), tmp_path / "out")
    settings = load(tmp_path / "out").generation_config
    assert settings.to_dict() == load(source).generation_config.to_dict()
    assert (settings.eos_token_id, settings.pad_token_id, settings.temperature) == ([2, 0], 0, 0.6)


def test_generation_stops_at_the_tokenizers_ends_where_nothing_is_said(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink()
    import_hf(HFFolder(tmp_path / "hf"), tmp_path / "checkpoint")
    export_hf(SavedModel(tmp_path / "checkpoint"), tmp_path / "out")
    settings = load(tmp_path / "out").generation_config
    # <|im_end|>, which ends a turn, and <|endoftext|>, which ends a document.
    assert (settings.eos_token_id, settings.pad_token_id) == ([2, 0], 0)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    # Not the padding token, whose embedding Transformers would not train.
    assert (config.eos_token_id, config.pad_token_id) == (2, None)


def test_where_generation_stops_is_kept_without_a_tokenizer_too(source: Path, tmp_path: Path) -> None:
    hf_model().save_pretrained(tmp_path / "hf")
    shutil.copyfile(source / "generation_config.json", tmp_path / "hf" / "generation_config.json")
    import_hf(HFFolder(tmp_path / "hf"), tmp_path / "checkpoint")
    for name, opened in (("imported", SavedModel(tmp_path / "checkpoint")), ("direct", HFFolder(tmp_path / "hf"))):
        export_hf(opened, tmp_path / name)
        expected = (tmp_path / "hf" / "generation_config.json").read_bytes()
        assert (tmp_path / name / "generation_config.json").read_bytes() == expected, name


def test_a_model_without_a_tokenizer_goes_there_and_back(tmp_path: Path) -> None:
    hf_model().save_pretrained(tmp_path / "hf")
    import_hf(HFFolder(tmp_path / "hf"), tmp_path / "checkpoint")
    assert SavedModel(tmp_path / "checkpoint").tokenizer is None
    export_hf(SavedModel(tmp_path / "checkpoint"), tmp_path / "back")
    assert {path.name for path in (tmp_path / "back").iterdir()} == {"config.json", "generation_config.json", SINGLE}
    load(tmp_path / "back")


def test_a_tokenizer_that_is_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    hf_model(vocab_size=300).save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", vocab_size=310)
    count = Tokenizer(tmp_path / "hf").num_ids
    assert count > 300
    with pytest.raises(UserError, match=f"ids go up to {count - 1}, but the model has a vocabulary of 300") as caught:
        import_hf(HFFolder(tmp_path / "hf"), tmp_path / "checkpoint")
    assert str(tmp_path / "hf") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_named_where_it_is(source: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / file).write_text("{")
    with pytest.raises(UserError, match="tokenizer") as caught:
        import_hf(HFFolder(tmp_path / "hf"), tmp_path / "checkpoint")
    assert str(tmp_path / "hf") in str(caught.value)  # and not a temporary folder that is gone by now
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# The checkpoint, and finding it


def test_an_imported_checkpoint_is_whole_and_says_what_it_is(checkpoint: Path, source: Path) -> None:
    assert problem_of(checkpoint) is None
    opened = open_model(str(checkpoint), verify=True)
    assert isinstance(opened, SavedModel)
    assert opened.config == HFFolder(source).config
    assert opened.tokenizer == checkpoint / "tokenizer"
    assert f"imported from {source}" in (checkpoint / "config.toml").read_text()


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "config.toml", "tokenizer/tokenizer.json"])
def test_a_byte_that_has_changed_makes_the_export_fail(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    flip(damaged / file)
    with pytest.raises(SystemExit) as ended:
        export_command.main(["--checkpoint", str(damaged), "--output", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {damaged}: {file} has changed since it was written\n"
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Path:
    """A run's folder with checkpoints of steps 5, 10 and 100."""
    for step in (5, 10, 100):
        shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint" / f"step-{step}")
    return tmp_path / "run"


def test_the_newest_whole_checkpoint_of_a_run_is_taken(run: Path) -> None:
    checkpoints = run / "checkpoint"
    said: list[str] = []
    for source in (run, checkpoints, checkpoints / "step-100"):
        assert open_model(str(source), verify=True, say=said.append).path == checkpoints / "step-100"
    assert open_model(str(checkpoints / "step-10"), verify=True, say=said.append).path == checkpoints / "step-10"
    assert said == []

    flip(checkpoints / "step-100" / "__0_0.distcp")
    (checkpoints / "step-10" / "manifest.json").unlink()
    assert open_model(str(run), verify=True, say=said.append).path == checkpoints / "step-5"
    assert said == [
        f"skipping the checkpoint {checkpoints / 'step-100'}: __0_0.distcp has changed since it was written",
        f"skipping the checkpoint {checkpoints / 'step-10'}: manifest.json is missing",
    ]

    (checkpoints / "step-5" / ".metadata").unlink()
    with pytest.raises(UserError, match="none of its 3 checkpoints is whole") as caught:
        open_model(str(run), verify=True, say=said.append)
    assert str(checkpoints) in str(caught.value)


def test_the_export_of_a_run_says_what_it_skipped(
    run: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(run / "checkpoint" / "step-100" / "__0_0.distcp")
    export_command.main(["--checkpoint", str(run), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert f"skipping the checkpoint {run}/checkpoint/step-100: __0_0.distcp has changed" in printed.err
    assert printed.out.strip().endswith(f"of {run}/checkpoint/step-10")
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(source))


def unfinished(root: Path, checkpoint: Path) -> Path:
    shutil.copytree(checkpoint, root / "checkpoint" / "tmp-step-5")
    (root / "checkpoint" / "tmp-step-5" / "manifest.json").unlink()
    return root


def step_without_manifest(root: Path, checkpoint: Path) -> Path:
    step = shutil.copytree(checkpoint, root / "checkpoint" / "step-5")
    (step / "manifest.json").unlink()
    return Path(step)


def empty(root: Path, checkpoint: Path) -> Path:
    root.mkdir()
    return root


def misspelled(root: Path, checkpoint: Path) -> Path:
    root.mkdir()
    return root.parent / "muddel"


def without_model(root: Path, checkpoint: Path) -> Path:
    step = Path(shutil.copytree(checkpoint, root))
    text = (step / "config.toml").read_text()
    (step / "config.toml").write_text(text.replace("hidden_size", "hidden_sighs"))
    return step


NOWHERE: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "run killed in its first save": (unfinished, "{} holds neither.*its only checkpoint was never finished"),
    "its temporary folder": (
        lambda root, checkpoint: unfinished(root, checkpoint) / "checkpoint" / "tmp-step-5",
        "{} holds neither.*a checkpoint without its manifest was never finished",
    ),
    "no manifest": (step_without_manifest, "{} holds neither.*a checkpoint without its manifest was never finished"),
    "empty folder": (empty, "{} holds neither checkpoints nor a model: .* and no config.json$"),
    "misspelled": (misspelled, "there is no folder {}; did you mean .*/model[?]$"),
    "nothing of that name": (lambda root, checkpoint: root / "x" / "y", "there is no folder {}$"),
    "a file": (lambda root, checkpoint: checkpoint / "config.toml", "{} is a file; name the folder it is in"),
    "unknown home": (lambda root, checkpoint: Path("~nobody-of-that-name/model"), "there is no folder {}"),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("make", "message"), NOWHERE.values(), ids=NOWHERE)
def test_where_no_model_is(
    checkpoint: Path, tmp_path: Path, make: Callable[[Path, Path], Path], message: str, verify: bool
) -> None:
    path = make(tmp_path / "model", checkpoint)
    with pytest.raises(UserError, match=message.format(path)) as caught:
        open_model(str(path), verify=verify)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_does_not_say_what_it_is(checkpoint: Path, tmp_path: Path) -> None:
    path = without_model(tmp_path / "model", checkpoint)
    with pytest.raises(UserError, match=f"{path}: its config.toml does not describe a model: .*hidden_size"):
        open_model(str(path), verify=False)
    with pytest.raises(UserError, match=f"{path}: config.toml has "):
        open_model(str(path), verify=True)


# What is there already stays, and what fails leaves nothing


Write = Callable[[Path], None]


@pytest.fixture(params=["import", "export"])
def write(request: pytest.FixtureRequest, source: Path, checkpoint: Path) -> Write:
    """Either of the two ways to write a folder."""
    if request.param == "import":
        return lambda output: import_hf(HFFolder(source), output)
    return lambda output: export_hf(SavedModel(checkpoint), output, max_shard_size=PARTS)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that has room for one file of weights."""
    written: list[Path] = []

    def save(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        if written:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        save_file(tensors, path, **options)

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        folder = kwargs["storage_writer"].path
        (Path(folder) / "__0_0.distcp").write_bytes(b"half")
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(hf_export, "save_file", save)
    monkeypatch.setattr(dcp, "save", save_checkpoint)


def test_a_folder_with_something_in_it_is_refused_and_untouched(write: Write, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"--output {tmp_path}/out: exists already"):
        write(tmp_path / "out")
    assert contents(tmp_path) == {"out/notes.txt": b"mine"}


def test_a_file_is_refused_and_untouched(write: Write, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path / "out")
    with pytest.raises(UserError, match=r"cannot be written: .*Not a directory"):
        write(tmp_path / "out" / "below")
    assert contents(tmp_path) == {"out": b"mine"}


def test_an_empty_folder_is_taken_and_parents_are_made(write: Write, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    write(tmp_path / "new" / "deep" / "out")
    assert contents(tmp_path / "empty").keys() == contents(tmp_path / "new" / "deep" / "out").keys()
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


def test_someone_elses_folder_beside_it_is_left_alone(write: Write, tmp_path: Path) -> None:
    (tmp_path / "tmp-out").mkdir()
    (tmp_path / "tmp-out" / "notes.txt").write_text("mine")
    write(tmp_path / "out")
    assert (tmp_path / "tmp-out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("output", ["out", "new/deep/out"])
def test_a_full_disk_leaves_one_message_and_nothing_else(
    write: Write, full_disk: None, tmp_path: Path, output: str
) -> None:
    with pytest.raises(UserError, match=f"--output {tmp_path}/{output}: cannot be written: .*No space left on device"):
        write(tmp_path / output)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_export, "save_file", interrupt)
    monkeypatch.setattr(dcp, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# The command line


def interpreter(*arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -m torchtitan_style …`` as a user would."""
    line = [sys.executable, "-m", "torchtitan_style", *map(str, arguments)]
    return subprocess.run(
        line, env=ENVIRONMENT, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, **options
    )


@pytest.fixture(scope="module")
def command(python: Python) -> Python:
    """Run ``python -m torchtitan_style …``, where the Hub cannot be reached."""

    def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = ENVIRONMENT | {"HF_HOME": str(cwd / "hub")}
        return python("-m", "torchtitan_style", *arguments, environment=environment, cwd=cwd)

    return run


def no_large_files() -> None:
    """In the process to be started: files end at 100 kB, which is an error as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("name", ["import-hf", "export-hf"])
def test_a_disk_that_is_really_full_is_one_message(source: Path, checkpoint: Path, tmp_path: Path, name: str) -> None:
    given = ["--hf", source] if name == "import-hf" else ["--checkpoint", checkpoint]
    process = interpreter(name, *given, "--output", "out", cwd=tmp_path, preexec_fn=no_large_files)
    assert list(tmp_path.iterdir()) == []
    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith("error: --output out: cannot be written: ")
    assert "Traceback" not in process.stderr


def test_both_commands_do_what_the_functions_do(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    process = interpreter("import-hf", "--hf", source, "--output", "imported", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("imported: 0.2 M parameters")
    options = ["--dtype", "bfloat16", "--max-shard-size", "100KB"]
    process = interpreter("export-hf", "--checkpoint", "imported", "--output", "out", *options, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert_same_bits(
        tensors_of(tmp_path / "out"), {name: t.to(torch.bfloat16) for name, t in tensors_of(source).items()}
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert sorted(os.listdir(tmp_path)) == ["imported", "out"]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "import, no options": (["import-hf"], "--hf, --output"),
    "import, no output": (["import-hf", "--hf", "{source}"], "--output"),
    "import, unknown option": (["import-hf", "--hf", "{source}", "--output", "out", "--dtype", "float32"], "--dtype"),
    "import, no value": (["import-hf", "--output", "out", "--hf"], "--hf: expected one argument"),
    "import, Hub name": (["import-hf", "--hf", "Qwen/Qwen3-0.6B", "--output", "out"], "no folder Qwen/Qwen3-0.6B here"),
    "import, a checkpoint": (
        ["import-hf", "--hf", "{checkpoint}", "--output", "out"],
        "is a checkpoint, not a model in",
    ),
    "export, no output": (["export-hf", "--checkpoint", "{checkpoint}"], "--output"),
    "export, no checkpoint": (["export-hf", "--output", "out"], "--checkpoint"),
    "export, unknown option": (
        ["export-hf", "--checkpoint", "{checkpoint}", "--output", "out", "--shards"],
        "--shards",
    ),
    "export, short for an option": (["export-hf", "--check", "{checkpoint}", "--output", "out"], "--check"),
    "export, type": (["export-hf", "--checkpoint", "{checkpoint}", "--output", "out", "--dtype", "fp16"], "--dtype"),
    "export, Hub name": (["export-hf", "--checkpoint", "someone/model", "--output", "out"], "no folder someone/model"),
    "export, size": (
        ["export-hf", "--checkpoint", "{checkpoint}", "--output", "out", "--max-shard-size", "five"],
        "--max-shard-size five",
    ),
    "export, output in use": (["export-hf", "--checkpoint", "{checkpoint}", "--output", "{source}"], "exists already"),
    "export, misspelled command": (["export_hf", "--output", "out"], "export-hf"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message(
    command: Python, source: Path, checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    before = contents(source)
    arguments = [argument.format(source=source, checkpoint=checkpoint) for argument in arguments]
    process = command(*arguments, cwd=tmp_path)
    assert "Traceback" not in process.stderr
    assert process.returncode == 2, process.stdout + process.stderr
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
    assert message in process.stderr
    assert not (tmp_path / "out").exists()
    assert contents(source) == before


@pytest.mark.parametrize("size", ["five", "5", "GB", "5XB", "", "nanGB", "infGB", "-5GB", "0GB"])
def test_a_size_that_is_none_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        export_command.main(
            ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), f"--max-shard-size={size}"]
        )
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: --max-shard-size {size}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["import-hf", "export-hf"])
def test_help(command: Python, tmp_path: Path, name: str) -> None:
    process = command(name, "--help", cwd=tmp_path)
    assert process.returncode == 0
    assert process.stdout.startswith(f"usage: python -m torchtitan_style {name} ")
    assert process.stderr == ""
