"""A model folder that is damaged or another model's is refused before a weight is read, and the message says
which file or tensor is the trouble. What is whole is read bit for bit, in parts too.

Each folder here is really broken in the way that it says: files are written by safetensors, then changed byte by
byte, and safetensors itself has to refuse those that are damaged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from tiny_hf import hf_model, write_tokenizer
from torch import Tensor

from torchtitan_style.checkpoint.saved import open_model
from torchtitan_style.common.errors import UserError
from torchtitan_style.models.hf_folder import HFFolder
from torchtitan_style.models.qwen3.config import Qwen3Config
from torchtitan_style.models.qwen3.hf import parameter_shapes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q_NORM, K_NORM = "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight"
EMBEDDING, HEAD, GATE = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that are right: tied and untied, in one file and in many."""
    root = tmp_path_factory.mktemp("whole")
    for tied in (True, False):
        model = hf_model(tie_word_embeddings=tied)
        model.save_pretrained(root / f"{'tied' if tied else 'untied'}-one")
        model.save_pretrained(root / f"{'tied' if tied else 'untied'}-many", max_shard_size="200KB")
    assert len(list((root / "tied-many").glob("*.safetensors"))) > 2
    return root


@pytest.fixture
def one(whole: Path, tmp_path: Path) -> Path:
    """A tied model in one file, to be damaged."""
    return Path(shutil.copytree(whole / "tied-one", tmp_path / "model"))


@pytest.fixture
def untied(whole: Path, tmp_path: Path) -> Path:
    """An untied model in one file, to be damaged."""
    return Path(shutil.copytree(whole / "untied-one", tmp_path / "model"))


@pytest.fixture
def many(whole: Path, tmp_path: Path) -> Path:
    """A tied model in several files, to be damaged."""
    return Path(shutil.copytree(whole / "tied-many", tmp_path / "model"))


def refusal(folder: Path, config: Qwen3Config | None = None) -> str:
    """The message that ``folder`` is refused with, which names it."""
    with pytest.raises(UserError) as caught:
        HFFolder(folder).check(config)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Write the one file of ``folder`` anew with other tensors."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def join(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# What is right


@pytest.mark.parametrize("kind", ["tied-one", "tied-many", "untied-one", "untied-many"])
def test_what_transformers_writes_is_accepted_and_read_bit_for_bit(whole: Path, kind: str) -> None:
    folder = HFFolder(whole / kind)
    folder.check()
    expected: dict[str, Tensor] = {}
    for file in sorted((whole / kind).glob("*.safetensors")):
        expected |= load_file(file)
    assert {name: tensor.shape for name, tensor in folder.tensors.items()} == parameter_shapes(folder.config)
    assert folder.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(folder.read(name), tensor), name


@pytest.mark.parametrize("kind", ["tied-one", "untied-many"])
def test_a_part_is_that_part_of_the_whole(whole: Path, kind: str) -> None:
    folder = HFFolder(whole / kind)
    # By name and not by file, so that files are opened again and again.
    for name in sorted(folder.tensors, reverse=True):
        tensor = folder.read(name)
        size = len(tensor)
        for rows in (slice(0, size), slice(0, size // 4), slice(size // 4, size // 2), slice(size - 1, size)):
            assert torch.equal(folder.read(name, (rows,)), tensor[rows]), name
            for columns in (slice(0, 16), slice(5, 6), slice(32, 64)) if tensor.ndim == 2 else ():
                assert torch.equal(folder.read(name, (rows, columns)), tensor[rows, columns]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_read_in_the_type_they_are_stored_in(one: Path, dtype: torch.dtype) -> None:
    change_tensors(one, lambda t: t.update({name: t[name].to(dtype) for name in (Q_NORM, GATE)}))
    folder = HFFolder(one)
    folder.check()
    assert {name: folder.read(name).dtype for name in (Q_NORM, GATE, EMBEDDING)} == {
        Q_NORM: dtype, GATE: dtype, EMBEDDING: torch.float32,
    }  # fmt: skip
    assert folder.read(Q_NORM, (slice(2, 7),)).dtype == dtype


def test_the_tokenizer_is_in_the_folder_if_there_is_one(one: Path) -> None:
    assert HFFolder(one).tokenizer is None
    write_tokenizer(one)
    assert HFFolder(one).tokenizer == one


# Tied and untied


@pytest.mark.parametrize("many_files", [False, True])
def test_a_tied_model_may_have_its_head_as_well_if_it_is_the_embedding(one: Path, many_files: bool) -> None:
    if many_files:  # the two in different files
        tensors = load_file(one / SINGLE)
        (one / SINGLE).unlink()
        save_file({HEAD: tensors[EMBEDDING].clone()}, one / "a.safetensors")
        save_file(tensors, one / "b.safetensors")
        weight_map = {HEAD: "a.safetensors"} | dict.fromkeys(tensors, "b.safetensors")
        (one / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    else:
        change_tensors(one, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    folder = HFFolder(one)
    assert HEAD in folder.tensors
    folder.check()


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "a bit": lambda t: t + (torch.arange(t.numel()).view_as(t) == t.numel() - 1),
    "all": lambda t: torch.randn_like(t),
    "type": lambda t: t.to(torch.bfloat16),
    "shape": lambda t: t[:-1].clone(),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_tied_model_with_another_head_is_refused(one: Path, head: Callable[[Tensor], Tensor]) -> None:
    change_tensors(one, lambda t: t.update({HEAD: head(t[EMBEDDING])}))
    message = refusal(one)
    assert f"{HEAD} is not {EMBEDDING}, though config.json says tie_word_embeddings = true" in message


def test_an_untied_model_needs_its_head(untied: Path) -> None:
    change_tensors(untied, lambda t: t.pop(HEAD))
    message = refusal(untied)
    assert "1 of 25 tensors are missing: lm_head.weight" in message
    assert "with tie_word_embeddings = true in config.json the embedding would take its place" in message


# Other tensors than the model's

WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "one missing": (lambda t: t.pop(GATE), f"1 of 24 tensors are missing: {GATE}"),
    "many missing": (
        lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name],
        "11 of 24 tensors are missing: model.layers.1.",
    ),
    "embedding missing, its copy there": (
        lambda t: t.update({HEAD: t.pop(EMBEDDING)}),
        f"1 of 24 tensors are missing: {EMBEDDING}",
    ),
    "one too many": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}),
        "1 tensors do not belong to the model: model.layers.0.self_attn.q_proj.bias",
    ),
    "a layer too many": (
        lambda t: t.update({n.replace(".1.", ".2."): v.clone() for n, v in t.items() if ".layers.1." in n}),
        "11 tensors do not belong to the model: model.layers.2.",
    ),
    "another prefix": (
        lambda t: t.update({"transformer.norm.weight": t.pop("model.norm.weight")}),
        "1 of 24 tensors are missing: model.norm.weight; 1 tensors do not belong to the model: transformer.norm.weight",
    ),
    "shape": (
        lambda t: t.update({GATE: t[GATE][:, :63].clone()}),
        f"1 tensors have another shape: {GATE} is 96 × 63, not 96 × 64",
    ),
    "transposed": (
        lambda t: t.update({GATE: t[GATE].T.contiguous()}),
        f"{GATE} is 64 × 96, not 96 × 64",
    ),
    "one dimension too few": (lambda t: t.update({GATE: t[GATE].flatten()}), f"{GATE} is 6144, not 96 × 64"),
    "a smaller vocabulary": (
        lambda t: t.update({EMBEDDING: t[EMBEDDING][:500].clone()}),
        f"{EMBEDDING} is 500 × 64, not 512 × 64",
    ),
    "int8": (
        lambda t: t.update({GATE: (t[GATE] * 100).to(torch.int8)}),
        f"1 tensors are I8, which is not supported: {GATE}",
    ),
    "int64": (
        lambda t: t.update({Q_NORM: t[Q_NORM].long()}),
        f"1 tensors are I64, which is not supported: {Q_NORM}",
    ),
    "float64": (
        lambda t: t.update({Q_NORM: t[Q_NORM].double()}),
        f"1 tensors are F64, which is not supported: {Q_NORM}",
    ),
    "fp8": (
        lambda t: t.update({n: v.to(torch.float8_e4m3fn) for n, v in t.items() if "mlp" in n}),
        "6 tensors are F8_E4M3, which is not supported: model.layers.0.mlp.",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_other_tensors_are_named(one: Path, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    change_tensors(one, change)
    assert message in refusal(one)


def test_all_that_is_wrong_is_said_at_once_and_not_at_length(one: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]
        tensors["extra"] = torch.zeros(1)
        tensors[Q_NORM] = tensors[Q_NORM].to(torch.int32)
        tensors[K_NORM] = torch.ones(17)

    change_tensors(one, change)
    message = refusal(one)
    for part in ("11 of 24 tensors are missing", "do not belong to the model: extra", f"{K_NORM} is 17, not 16", "I32"):
        assert part in message
    assert len(message) < 800


def test_settings_that_override_config_json_are_pointed_out(one: Path) -> None:
    shape = HFFolder(one).config.__dict__
    message = refusal(one, Qwen3Config(**shape | {"intermediate_size": 128}))
    assert "6 tensors have another shape: " in message
    assert "not 128 × 64" in message
    assert message.endswith("The [model] section overrides what config.json says")
    HFFolder(one).check(Qwen3Config(**shape | {"dropout": 0.1, "rope_theta": 1e6}))  # which need no other weights


# Damaged files


def header_of(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Another header before the same data."""

    def damage(raw: bytes) -> bytes:
        header, data = split(raw)
        changed = change(header)
        return join(header if changed is None else changed, data)

    return damage


def gap(raw: bytes) -> bytes:
    """8 bytes that belong to no tensor, before K_NORM."""
    header, data = split(raw)
    at = header[K_NORM]["data_offsets"][0]
    for entry in header.values():
        if entry.get("data_offsets", [0])[0] >= at:
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    return join(header, data[:at] + bytes(8) + data[at:])


def overlap(raw: bytes) -> bytes:
    """The last tensor begins 16 bytes inside of the one before."""
    header, data = split(raw)
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"] = [offset - 16 for offset in header[last]["data_offsets"]]
    return join(header, data[:-16])


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "last byte cut off": (lambda raw: raw[:-1], "is truncated: its header announces"),
    "half": (lambda raw: raw[: len(raw) // 2], "is truncated: its header announces"),
    "header alone": (lambda raw: raw[: 8 + int.from_bytes(raw[:8], "little")], "is truncated: its header announces"),
    "header cut": (lambda raw: raw[:100], "is truncated, or no safetensors file: its header does not fit into 100"),
    "8 bytes": (lambda raw: raw[:8], "is truncated, or no safetensors file: its header does not fit into 8 bytes"),
    "7 bytes": (lambda raw: raw[:7], "is truncated, or no safetensors file"),
    "empty": (lambda raw: b"", "is truncated, or no safetensors file: its header does not fit into 0 bytes"),
    "byte added": (lambda raw: raw + b"\0", "is damaged: its header announces"),
    "header longer than the file": (
        lambda raw: len(raw).to_bytes(8, "little") + raw[8:],
        "is truncated, or no safetensors file: its header does not fit",
    ),
    "header of 2⁶⁴ bytes": (lambda raw: b"\xff" * 8 + raw[8:], "no safetensors file: its header does not fit"),
    "a zip file": (lambda raw: b"PK\x03\x04\0\0\0\0\0\0" + raw, "no safetensors file"),
    "a web page": (lambda raw: b"<!DOCTYPE html><html><body>429</body></html>", "no safetensors file"),
    "zeros": (lambda raw: bytes(len(raw)), "no safetensors file: its header cannot be read"),
    "header not JSON": (lambda raw: raw[:8] + b"x" + raw[9:], "no safetensors file: its header cannot be read"),
    "header not UTF-8": (lambda raw: raw[:12] + b"\xff" + raw[13:], "no safetensors file: its header cannot be read"),
    "header nested without end": (
        lambda raw: (200_000).to_bytes(8, "little") + b"[" * 200_000 + raw,
        "no safetensors file: its header cannot be read",
    ),
    "header a list": (header_of(lambda h: list(h)), "no safetensors file: its header cannot be read"),
    "header of numbers": (header_of(lambda h: dict.fromkeys(h, 1)), "no safetensors file: its header cannot be read"),
    "tensor without a place": (header_of(lambda h: h[GATE].pop("data_offsets") and None), "header cannot be read"),
    "tensor without a shape": (header_of(lambda h: h[GATE].pop("shape") and None), "header cannot be read"),
    "tensor without a type": (header_of(lambda h: h[GATE].pop("dtype") and None), "header cannot be read"),
    "tensor of another shape than its bytes": (
        header_of(lambda h: h[GATE].update(shape=[96, 65])),
        f"is damaged: its header contradicts itself about {GATE}",
    ),
    "tensor of another type than its bytes": (
        header_of(lambda h: h[GATE].update(dtype="BF16")),
        f"is damaged: its header contradicts itself about {GATE}",
    ),
    "gap": (gap, f"is damaged: its header contradicts itself about {K_NORM}"),
    "overlap": (overlap, "is damaged: its header contradicts itself about model."),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("kind", ["one", "many"])
def test_a_damaged_file_is_named(
    request: pytest.FixtureRequest, kind: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    folder: Path = request.getfixturevalue(kind)
    path = folder / SINGLE
    if kind == "many":  # the one that holds what is damaged
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        path = folder / weight_map[K_NORM if damage is gap else GATE]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(path, framework="pt").__enter__()
    found = refusal(folder)
    assert found.startswith(f"{path}: ")
    assert message in found


def test_a_git_lfs_pointer_is_recognised(one: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1503300328\n"
    (one / SINGLE).write_text(text)
    message = refusal(one)
    assert message.startswith(str(one / SINGLE))
    assert "is a git-lfs pointer, not the file itself; `git lfs pull` fetches it" in message


# The index


def test_a_file_that_is_not_there_is_named(many: Path) -> None:
    file = sorted(many.glob("*.safetensors"))[1]
    tensors = load_file(file)
    file.unlink()
    assert f"{file.name}, with {len(tensors)} of its tensors, is not there" in refusal(many)


def test_a_tensor_that_is_in_another_file_is_named(many: Path) -> None:
    files = sorted(path.name for path in many.glob("*.safetensors"))
    where = json.loads((many / INDEX).read_text())["weight_map"][GATE]
    other = next(file for file in files if file != where)
    change_json(many / INDEX, lambda index: index["weight_map"].update({GATE: other}))
    assert f"{INDEX}: says that {GATE} is in {other}, but it is not" in refusal(many)


def test_a_tensor_that_the_index_leaves_out_is_missing(many: Path) -> None:
    change_json(many / INDEX, lambda index: index["weight_map"].pop(GATE) and None)
    assert f"1 of 24 tensors are missing: {GATE}" in refusal(many)


@pytest.mark.parametrize(
    "content",
    ['{"metadata": {"total_size": 1}}', '{"weight_map": ["a.safetensors"]}', '{"weight_map": {"a": 1}}'],
    ids=["none", "list", "numbers"],
)
def test_an_index_without_a_map_is_refused(many: Path, content: str) -> None:
    (many / INDEX).write_text(content)
    assert refusal(many) == f'{many / INDEX}: has no "weight_map" from tensors to files'


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\0"])
def test_an_index_that_is_no_json_object_is_named(many: Path, content: str) -> None:
    (many / INDEX).write_text(content)
    assert refusal(many).startswith(f"{many / INDEX}: ")


@pytest.mark.parametrize("way", ["../{}", "sub/{}", "./{}", "{folder}/../{}", "../model/{}"])
def test_an_index_cannot_lead_out_of_the_folder(many: Path, way: str) -> None:
    file = sorted(path.name for path in many.glob("*.safetensors"))[0]
    (many / "sub").mkdir()
    for place in (many.parent, many / "sub"):  # it is there, and would be read
        shutil.copyfile(many / file, place / file)
    path = way.format(file, folder=many)
    assert (many / path).is_file()

    def lead(index: dict[str, Any]) -> None:
        index["weight_map"] = {n: path if where == file else where for n, where in index["weight_map"].items()}

    change_json(many / INDEX, lead)
    assert f"{INDEX}: names {path}, which is not a file of this folder" in refusal(many)


@pytest.mark.parametrize("file", ["..", ".", "", "model\0.safetensors"])
def test_an_index_that_names_no_file_at_all_is_refused(many: Path, file: str) -> None:
    change_json(many / INDEX, lambda index: index["weight_map"].update({GATE: file}))
    assert refusal(many).startswith(f"{many / INDEX}: ")


# Folders of another kind


def test_weights_in_another_format_are_named(one: Path) -> None:
    torch.save(load_file(one / SINGLE), one / "pytorch_model.bin")
    (one / SINGLE).unlink()
    message = refusal(one)
    assert f"there is neither {SINGLE} nor {INDEX}; pytorch_model.bin: only safetensors are read" in message


def test_no_weights_at_all(one: Path) -> None:
    (one / SINGLE).unlink()
    assert refusal(one) == f"{one}: there is neither {SINGLE} nor {INDEX}"


def test_no_config(one: Path) -> None:
    (one / "config.json").unlink()
    assert refusal(one) == f"{one}: has no config.json; is it a model folder in Transformers' format?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "qwen3",', "cannot be read: "),
        (b"", "cannot be read: "),
        (b'\xff{"model_type": "qwen3"}', "cannot be read: "),
        (b'["qwen3"]', "is not a JSON object"),
        (b'{"model_type": "llama"}', 'model_type is "llama"'),
        (b'{"model_type": "qwen3", "hidden_size": "64"}', "hidden_size must be a whole number"),
    ],
    ids=["cut", "empty", "not UTF-8", "list", "llama", "text for a number"],
)
def test_a_config_that_cannot_be_used_is_named(one: Path, content: bytes, message: str) -> None:
    (one / "config.json").write_bytes(content)
    assert refusal(one).startswith(f"{one / 'config.json'}: {message}")


def test_the_folder_of_another_size_is_refused(one: Path) -> None:
    change_json(one / "config.json", lambda config: config.update(num_hidden_layers=3, layer_types=None))
    assert "11 of 35 tensors are missing: model.layers.2." in refusal(one)
    change_json(one / "config.json", lambda config: config.update(num_hidden_layers=1))
    assert "11 tensors do not belong to the model: model.layers.1." in refusal(one)


def test_a_name_on_the_hub_may_be_like_that_of_a_folder_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen" / "Qwen3-1.7B").mkdir(parents=True)
    hf_model().save_pretrained(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchtitan_style.checkpoint.saved.fetch", lambda source, *, weights: tmp_path / "cache")
    assert open_model("Qwen/Qwen3-0.6B", verify=False).path == tmp_path / "cache"
