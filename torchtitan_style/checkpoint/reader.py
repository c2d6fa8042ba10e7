"""Reading a DCP checkpoint without running what is in it."""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.reading import open_regular
from torchtitan_style.distributed.local import local_tensor

from .metadata import read_metadata

_FILES_AT_ONCE = 4

_UNREADABLE = (
    RuntimeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
)
"""What reading a damaged tensor raises."""


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """DCP warns of its own use of old types, and of a process that saves or loads by itself, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TypedStorage is deprecated.*")
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninitialized.*")
        yield


class _Part(io.RawIOBase):
    """Some bytes of a file as a file. DCP has one that seeks wrongly from the end, which zipfile does."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        wanted = memoryview(buffer)[: max(0, self._length - self._at)]
        count: int = self._file.readinto(wanted)  # type: ignore[attr-defined]
        self._at += count
        return count


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, for what it reads to be checked. advance: called as reading proceeds, from any thread.

    A tensor that is wanted whole, as it is stored, is read straight into its place, several at once, which is twice as
    fast.
    """

    def __init__(self, path: Path, *, advance: Callable[[], None] = lambda: None) -> None:
        super().__init__(path)
        self._advance = advance

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self._metadata = metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        _check_coverage(plan, planner)
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)

        def read(name: str) -> list[ReadItem]:
            with open_regular(Path(self.path) / name) as file:
                return [item for item in by_file[name] if not self._read_straight(item, file, planner)]

        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            left = dict(zip(by_file, pool.map(read, by_file), strict=True))
        for name, items in left.items():
            with open_regular(Path(self.path) / name) as file:
                for item in items:
                    self._read_part(item, file, planner)
                    self._advance()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _archive(self, item: ReadItem, file: BinaryIO) -> tuple[Any, dict[str, int]]:
        """A stored tensor: a zip file, whose entries are not compressed. Its reader, and the bytes of each entry."""
        info = self.storage_data[item.storage_index]
        if info.offset + info.length > os.fstat(file.fileno()).st_size:
            raise UserError(f"{file.name}: is damaged: it is shorter than .metadata says")
        view: Any = _Part(file, info.offset, info.length)
        archive: Any = torch._C.PyTorchFileReader(view)
        # torch's own reader tells sizes since 2.12 only.
        with zipfile.ZipFile(view) as listed:
            entries = listed.infolist()
        if sum(entry.file_size for entry in entries) > info.length:
            raise UserError(f"{file.name}: is damaged: a tensor is larger than its part of the file")
        return archive, {entry.filename.partition("/")[2]: entry.file_size for entry in entries}

    def _read_part(self, item: ReadItem, file: BinaryIO, planner: LoadPlanner) -> None:
        """Read a piece, and copy the part of it that is wanted."""
        stored = self._stored(item)
        chunk = next(chunk for chunk in stored.chunks if chunk.offsets == item.storage_index.offset)
        info = self.storage_data[item.storage_index]
        try:
            self._archive(item, file)
            view: Any = _Part(file, info.offset, info.length)
            tensor = torch.load(view, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            first = str(error).strip().partition("\n")[0]
            raise UserError(f"{file.name}: is damaged: a tensor cannot be read: {first}") from None
        fits = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if not fits or tensor.shape != chunk.sizes or tensor.dtype != stored.properties.dtype:
            raise UserError(f"{file.name}: is damaged: a part of {item.dest_index.fqn} is not what .metadata says")
        target = planner.resolve_tensor(item).detach()
        target.copy_(tensor[tuple(slice(at, at + n) for at, n in zip(item.storage_offsets, item.lengths, strict=True))])
        planner.commit_tensor(item, target)

    def _stored(self, item: ReadItem) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata[item.dest_index.fqn]
        if item.type != LoadItemType.TENSOR or not isinstance(stored, TensorStorageMetadata):
            raise UserError(f"{self.path}: {item.dest_index.fqn} is not a tensor")
        return stored

    def _read_straight(self, item: ReadItem, file: BinaryIO, planner: LoadPlanner) -> bool:
        stored = self._stored(item)
        target = planner.resolve_tensor(item).detach()
        chunk = next(chunk for chunk in stored.chunks if chunk.offsets == item.storage_index.offset)
        if not (
            target.numel() and target.dtype == stored.properties.dtype and target.shape == chunk.sizes == item.lengths
        ):
            return False
        info = self.storage_data[item.storage_index]
        try:
            archive, sizes = self._archive(item, file)
            at = archive.get_record_offset("data/0")
            if sizes.get("data/0") != target.nbytes or at + target.nbytes > info.length:
                return False
        except _UNREADABLE:
            return False
        file.seek(info.offset + at)
        # What is on a GPU, or has gaps, is read beside it.
        place = target if target.is_cpu and target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)
        values: Any = place.view(-1).view(torch.uint8).numpy()
        if file.readinto(memoryview(values)) != target.nbytes:  # type: ignore[attr-defined]
            raise OSError(f"{file.name} ends early")
        if place is not target:
            target.copy_(place)
        planner.commit_tensor(item, target)
        self._advance()
        return True

    def check_metadata(self) -> None:
        """Raise UserError unless it can be read. To be called before DCP reads it, which takes any error for a
        checkpoint of another kind."""
        self.read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            metadata = read_metadata(Path(self.path))
        except (pickle.UnpicklingError, OSError, ValueError) as error:
            raise UserError(f"{Path(self.path) / '.metadata'}: not the metadata of a checkpoint: {error}") from None
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def _check_coverage(plan: LoadPlan, planner: LoadPlanner) -> None:
    """Raise UserError unless what is read fills this rank's part of each tensor, exactly once."""
    read: Counter[str] = Counter()
    for item in plan.items:
        read[item.dest_index.fqn] += math.prod(item.lengths)
    for name, tensor in getattr(planner, "state_dict", {}).items():
        if isinstance(tensor, Tensor) and read[name] != local_tensor(tensor).numel():
            raise UserError(f"{name}: the checkpoint has {read[name]:,} of {local_tensor(tensor).numel():,} elements")


def reason_of(error: OSError | UserError | CheckpointException) -> str:
    """What went wrong with a save or a load, of one rank: the others mostly say the same."""
    if isinstance(error, CheckpointException):
        rank, (failure, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {failure}" if len(str(failure)) else f"rank {rank}: {failure!r}"
    return str(error)
