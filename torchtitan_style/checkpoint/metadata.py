"""DCP's metadata: which tensors a checkpoint has, in which pieces, and where these are.

What ``.metadata`` says is checked as it is read: the pieces of each tensor cover it exactly once, and each is a part of
a file which no other piece has.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from torchtitan_style.common.errors import shown
from torchtitan_style.common.reading import check_text, read_bytes

from .unpickle import Made, Named, Pairs, unpickle

_MOST_BYTES = 2**31
_MOST_DIMS = 8
_LEAST_PIECE = 16
"""Bytes that a piece takes in the file at least, mostly ten times that: more pieces are the same one over and over."""


def read_metadata(folder: Path) -> Metadata:
    """Of the checkpoint in ``folder``. Raises UnpicklingError, ValueError or OSError if it is not what DCP writes."""
    data = read_bytes(folder / ".metadata", most=_MOST_BYTES)
    return _Reader(room=len(data) // _LEAST_PIECE).metadata(unpickle(data))


class _Reader:
    """room: pieces that there may be."""

    def __init__(self, *, room: int) -> None:
        self.room = room

    def metadata(self, node: Any) -> Metadata:
        fields = _fields(node, "Metadata")
        tensors = {name: self._tensor(name, entry) for name, entry in _entries(fields.get("state_dict_metadata"))}
        places = self._places(fields.get("storage_data"))
        for name, tensor in tensors.items():
            for piece in tensor.chunks:
                if math.prod(piece.sizes) and MetadataIndex(name, piece.offsets) not in places:
                    raise UnpicklingError(f"a part of {shown(name)} is in no file")
        return Metadata(state_dict_metadata=dict(tensors), storage_data=places)

    def _tensor(self, name: str, node: Any) -> TensorStorageMetadata:
        fields = _fields(node, "TensorStorageMetadata")
        size, chunks = _size(fields.get("size")), fields.get("chunks")
        if type(chunks) is not list:
            raise UnpicklingError(f"{shown(name)} has no list of its parts")
        self.room -= len(chunks)
        if self.room < 0:
            raise UnpicklingError("it lists more tensor parts than its size allows")
        pieces = [_chunk(chunk) for chunk in chunks]
        if not covers_once(size, [(piece.offsets, piece.sizes) for piece in pieces]):
            raise UnpicklingError(f"the parts of {shown(name)} do not cover it exactly once")
        return TensorStorageMetadata(
            properties=TensorProperties(dtype=_dtype(fields.get("properties"))), size=size, chunks=pieces
        )

    def _places(self, node: Any) -> dict[MetadataIndex, _StorageInfo]:
        if type(node) is not Pairs:
            raise UnpicklingError("it does not say where the tensors are")
        places: dict[MetadataIndex, _StorageInfo] = {}
        spans: dict[str, list[tuple[int, int]]] = {}
        for key, value in node:
            index, place = _index(key), _place(value)
            if index in places:
                raise UnpicklingError(f"a part of {shown(index.fqn)} is in two places")
            places[index] = place
            if place.length:
                spans.setdefault(place.relative_path, []).append((place.offset, place.offset + place.length))
        for name, parts in spans.items():
            parts.sort()
            if any(end > start for (_, end), (start, _) in itertools.pairwise(parts)):
                raise UnpicklingError(f"parts of {name} belong to two tensors")
        return places


def covers_once(size: torch.Size, pieces: list[tuple[torch.Size, torch.Size]]) -> bool:
    """Whether ``pieces``, as (offsets, sizes), cover each element of a tensor exactly once, and nothing else.

    Boxes add up to a box if and only if their corners do, each counted with the sign of its side in every dimension:
    these are the derivatives of their characteristic functions.
    """
    if any(len(offsets) != len(size) or len(sizes) != len(size) for offsets, sizes in pieces):
        return False
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, (offsets, sizes) in [(-1, (torch.Size([0] * len(size)), size)), *((1, piece) for piece in pieces)]:
        sides = [((start, 1), (start + length, -1)) for start, length in zip(offsets, sizes, strict=True)]
        for corner in itertools.product(*sides):
            corners[tuple(at for at, _ in corner)] += sign * math.prod(side for _, side in corner)
    return not any(corners.values())


def _fields(node: Any, name: str) -> dict[str, Any]:
    """The state of an instance of the class ``name``."""
    if type(node) is not Made or node.key[1] != name:
        kind = node.key[1] if type(node) is Made else type(node).__name__
        raise UnpicklingError(f"expected a {name}, found a {kind}")
    return dict(_entries(node.state))


def _entries(node: Any) -> list[tuple[str, Any]]:
    """The pairs of a dictionary whose keys are texts, none of them twice."""
    if type(node) is not Pairs or not all(type(key) is str for key, _ in node):
        raise UnpicklingError("it is damaged: expected a dictionary")
    if len({key for key, _ in node}) < len(node):
        raise UnpicklingError("it has the same key twice")
    return node


def _number(node: Any) -> int:
    if type(node) is not int or not 0 <= node < 2**63:
        raise UnpicklingError("expected a number")
    return node


def _size(node: Any) -> torch.Size:
    values = node.args[0] if type(node) is Made and node.key == ("torch", "Size") and len(node.args) == 1 else None
    if type(values) is not tuple or len(values) > _MOST_DIMS:
        raise UnpicklingError("expected the shape of a tensor")
    size = torch.Size([_number(value) for value in values])
    if math.prod(size) >= 2**63:
        raise UnpicklingError(f"no tensor can have the shape {list(size)}")
    return size


def _chunk(node: Any) -> ChunkStorageMetadata:
    fields = _fields(node, "ChunkStorageMetadata")
    return ChunkStorageMetadata(offsets=_size_of_offsets(fields.get("offsets")), sizes=_size(fields.get("sizes")))


def _size_of_offsets(node: Any) -> torch.Size:
    """Offsets are written as a shape; their product means nothing."""
    values = node.args[0] if type(node) is Made and node.key == ("torch", "Size") and len(node.args) == 1 else None
    if type(values) is not tuple or len(values) > _MOST_DIMS:
        raise UnpicklingError("expected the offsets of a tensor part")
    return torch.Size([_number(value) for value in values])


def _dtype(node: Any) -> torch.dtype:
    """Of a tensor's properties: type, layout, whether it requires a gradient, memory format, whether it is pinned."""
    if type(node) is not Made or node.key[1] != "TensorProperties" or type(node.state) is not tuple:
        raise UnpicklingError("it does not say what type its tensors are")
    if len(node.state) != 5 or type(node.state[0]) is not Named or node.state[0].key[0] != "torch":
        raise UnpicklingError("it does not say what type its tensors are")
    layout = node.state[1]
    if type(layout) is not Made or layout.args != ("torch.strided",):
        raise UnpicklingError("it has a tensor that is not dense")
    dtype = getattr(torch, node.state[0].name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnpicklingError(f"it has tensors of the unknown type {node.state[0].name}")
    return dtype


def _index(node: Any) -> MetadataIndex:
    fields = _fields(node, "MetadataIndex")
    name, offset, number = fields.get("fqn"), fields.get("offset"), fields.get("index")
    if type(name) is not str:
        raise UnpicklingError("it has a part of a tensor without a name")
    return MetadataIndex(
        name, None if offset is None else _size_of_offsets(offset), None if number is None else _number(number)
    )


def _place(node: Any) -> _StorageInfo:
    fields = _fields(node, "_StorageInfo")
    name = fields.get("relative_path")
    if type(name) is not str or not name.endswith(".distcp") or "/" in name:
        raise UnpicklingError(f"it names {shown(name)}, which is not a checkpoint file")
    check_text(name)
    if fields.get("transform_descriptors"):
        raise UnpicklingError("its files are compressed or otherwise transformed, which is not supported")
    return _StorageInfo(name, _number(fields.get("offset")), _number(fields.get("length")))
