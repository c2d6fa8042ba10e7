"""A model folder in Transformers' format: ``config.json``, safetensors, a tokenizer.

What is wrong with one is found from its JSON files and the headers of its safetensors, before any
weight is read and without torch. Weights are then read a tensor or a slice at a time.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter

from torchtitan_style.common.errors import UserError, cut, shown
from torchtitan_style.common.reading import open_regular, parse_json, read_json, read_json_object
from torchtitan_style.common.typed import Content, Count, typed

from .registry import read_hf_config
from .spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor


GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    GENERATION,
)
"""All that belongs to text in and out: the tokenizer, the chat template, and where generation stops."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F32": ("float32", 4), "BF16": ("bfloat16", 2), "F16": ("float16", 2)}
"""The types that are read: safetensors' name, torch's, and bytes per number."""
_MOST_HEADER = 100_000_000
"""Bytes, as the library has it."""
_COMPARED_AT_ONCE = 2**24


def copy_assets(source: Path, folder: Path) -> None:
    """Copy those of ``TOKENIZER_FILES`` that ``source`` has, byte for byte."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def special_tokens(folder: Path) -> dict[str, str]:
    """Text of each special token that the tokenizer in ``folder`` names, by role, as "eos_token".

    From tokenizer_config.json, and as in Transformers from special_tokens_map.json, unless the former lists the added
    tokens, which newer tokenizers do. Raises ValueError or OSError if they cannot be read.
    """
    settings = _json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _json(folder / "special_tokens_map.json")
    tokens = {}
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(role)
        content = token.get("content", token) if isinstance(token, dict) else token
        if content is not None and not isinstance(content, str):
            raise ValueError(f"{role} must be text, not {shown(content)}")
        if content is not None:
            tokens[role] = content
    return tokens


def _json(path: Path) -> dict[str, Any]:
    """The object in ``path``; an empty one if there is no such file."""
    try:
        return read_json_object(path, most=2**26) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is. Its bytes are from ``start`` to ``stop`` of ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class HFFolder:
    """One such folder. Making one reads ``config.json``; raises UserError if that cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        settings = _read_json(path / "config.json")
        try:
            self.spec, self.config = read_hf_config(settings)
        except ValueError as error:
            raise UserError(f"{path / 'config.json'}: {error}") from None
        self._open: tuple[Path, Any] | None = None

    @property
    def assets(self) -> Path:
        """Where those of ``TOKENIZER_FILES`` are that there are."""
        return self.path

    @property
    def tokenizer(self) -> Path | None:
        """Where its tokenizer's files are, or None if it has none."""
        present = {p.name for p in self.path.iterdir()}
        return self.path if {"tokenizer.json", "vocab.json"} & present else None

    @functools.cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor in the folder's files, file by file. Raises UserError if a file is missing or damaged."""
        if (self.path / _SINGLE).is_file():
            return _read_header(self.path / _SINGLE)
        index = self.path / _INDEX
        if not index.is_file():
            others = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
            found = f"; {', '.join(others[:3])}: only safetensors are read" if others else ""
            raise UserError(f"{self.path}: there is neither {_SINGLE} nor {_INDEX}{found}")
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f'{index}: has no "weight_map" from tensors to files')
        tensors: dict[str, StoredTensor] = {}
        for file in sorted(set(weight_map.values())):
            wanted = [name for name, where in weight_map.items() if where == file]
            if Path(file).name != file:
                raise UserError(f"{index}: names {file}, which is not a file of this folder")
            if "\0" in file or not os.path.isfile(self.path / file):
                raise UserError(f"{index}: {cut(file, 200)}, with {len(wanted)} of its tensors, is not there")
            header = _read_header(self.path / file)
            if absent := [name for name in wanted if name not in header]:
                raise UserError(f"{index}: says that {_some(absent)} is in {file}, but it is not")
            tensors |= {name: header[name] for name in header if name in wanted}
        return tensors

    def check(self, config: Any = None) -> None:
        """Raise UserError, naming tensors, unless the weights are those of a model of ``config`` (left out: the
        folder's own)."""
        config = config or self.config
        wanted, tensors = self._shapes(config), self.tensors
        extra = [name for name in tensors if name not in wanted]
        if config.tie_word_embeddings and "lm_head.weight" in extra:
            self._check_tie()
            extra.remove("lm_head.weight")
        known = {dtype for dtype, _ in _DTYPES.values()}
        problems = []
        if missing := [name for name in wanted if name not in tensors]:
            problems.append(f"{len(missing)} of {len(wanted)} tensors are missing: {_some(missing)}")
            if missing == ["lm_head.weight"]:
                problems[-1] += "; with tie_word_embeddings = true in config.json the embedding would take its place"
        if extra:
            problems.append(f"{len(extra)} tensors do not belong to the model: {_some(extra)}")
        if wrong := [name for name in wanted if name in tensors and tensors[name].shape != wanted[name]]:
            shapes = (f"{name} is {_shape(tensors[name].shape)}, not {_shape(wanted[name])}" for name in wrong)
            problems.append(f"{len(wrong)} tensors have another shape: {_some(list(shapes))}")
        if other := [name for name in wanted if name in tensors and tensors[name].dtype not in known]:
            problems.append(
                f"{len(other)} tensors are {tensors[other[0]].dtype}, which is not supported: {_some(other)}"
            )
        if problems:
            overridden = config != self.config and any(
                wanted.get(name) != shape for name, shape in self._shapes(self.config).items()
            )
            hint = ". The [model] section overrides what config.json says" if overridden else ""
            raise UserError(f"{self.path}: {'; '.join(problems)}{hint}")

    def _shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that a folder with a model of ``config`` has."""
        return disk_shapes(self.spec, config)

    def _check_tie(self) -> None:
        """A folder with tied embeddings may have them twice, but not in two versions."""
        head, embedding = self.tensors["lm_head.weight"], self.tensors.get("model.embed_tokens.weight")
        if embedding is None:
            return
        same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
        if not (same and all(a == b for a, b in zip(blocks(head), blocks(embedding), strict=True))):
            raise UserError(
                f"{self.path}: lm_head.weight is not model.embed_tokens.weight, though config.json says "
                "tie_word_embeddings = true; if they are separate, set it to false there"
            )

    def read(self, name: str, where: tuple[slice, ...] | None = None) -> Tensor:
        """Tensor ``name``, or the part ``where`` of it, in the type that it is stored in. No other bytes are read."""
        from safetensors import SafetensorError, safe_open

        file = self.tensors[name].file
        if self._open is None or self._open[0] != file:  # one file mapped at a time
            self._open = None
            try:
                self._open = file, safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: cannot be read: {error}") from None
        handle = self._open[1]
        tensor: Tensor = handle.get_tensor(name) if where is None else handle.get_slice(name)[where]
        return tensor


def disk_shapes(spec: ModelSpec, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors on disk of a model of ``config``, in the order of its parameters."""
    shapes = spec.parameter_shapes(config)
    return {
        tensor.name: part_shape(shapes[name], tensor.part)
        for name, tensors in spec.disk_tensors(config).items()
        for tensor in tensors
    }


def part_shape(shape: tuple[int, ...], part: tuple[int | slice, ...]) -> tuple[int, ...]:
    """The shape of ``tensor[part]``, for a tensor of this shape."""
    kept = [
        len(range(*index.indices(size))) for index, size in zip(part, shape, strict=False) if isinstance(index, slice)
    ]
    return (*kept, *shape[len(part) :])


class _Entry(Content):
    """What a header says of a tensor."""

    dtype: str
    shape: list[Count]
    data_offsets: Annotated[list[Count], Field(min_length=2, max_length=2)]


_HEADER_METADATA: TypeAdapter[dict[str, str] | None] = TypeAdapter(dict[str, str] | None, config={"strict": True})


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds, in the order of its bytes.

    The format: 8 bytes with the length of a JSON header, the header, the tensors' bytes without a gap.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if start == b"version ":
            raise UserError(f"{path}: is a git-lfs pointer, not the file itself; `git lfs pull` fetches it")
        length = int.from_bytes(start, "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: is truncated, or no safetensors file: its header does not fit into {size} bytes")
        if length > _MOST_HEADER:
            raise UserError(f"{path}: is damaged, or no safetensors file: its header has {length:,} bytes")
        raw = file.read(length)
    try:
        if not raw.startswith(b"{"):
            raise ValueError("it is not a JSON object")
        header = parse_json(raw)
        typed(_HEADER_METADATA, header.pop("__metadata__", None))
        entries = {name: _Entry.model_validate(entry) for name, entry in header.items()}
    except ValueError:  # pydantic's errors are, too
        raise UserError(f"{path}: is damaged, or no safetensors file: its header cannot be read") from None
    begin = 8 + length
    tensors = {
        name: StoredTensor(
            file=path,
            dtype=_DTYPES[entry.dtype][0] if entry.dtype in _DTYPES else entry.dtype,
            shape=tuple(entry.shape),
            start=begin + entry.data_offsets[0],
            stop=begin + entry.data_offsets[1],
        )
        for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets)
    }
    end = max((tensor.stop for tensor in tensors.values()), default=begin)
    if end != size:
        what = "is truncated" if end > size else "is damaged"
        raise UserError(f"{path}: {what}: its header announces {end} bytes, but it has {size}")
    position = begin
    widths = dict(_DTYPES.values())
    for name, tensor in tensors.items():
        count = (tensor.stop - tensor.start) / widths.get(tensor.dtype, 1)
        if tensor.start != position or (tensor.dtype in widths and count != math.prod(tensor.shape)):
            raise UserError(f"{path}: is damaged: its header contradicts itself about {name}")
        position = tensor.stop
    return tensors


def blocks(tensor: StoredTensor) -> Iterator[bytes]:
    """The bytes of a tensor, a part at a time."""
    with open_regular(tensor.file) as file:
        file.seek(tensor.start)
        left = tensor.stop - tensor.start
        while left > 0:
            block = file.read(min(left, _COMPARED_AT_ONCE))
            left -= len(block)
            yield block


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path, most=2**26)
    except FileNotFoundError:
        raise UserError(f"{path.parent}: has no {path.name}; is it a model folder in Transformers' format?") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not a JSON object")
    return found


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _some(names: list[str]) -> str:
    """The first few of ``names``."""
    return ", ".join(cut(name, 200) for name in names[:4]) + (", …" if len(names) > 4 else "")
