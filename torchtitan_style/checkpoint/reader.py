"""Reading a DCP checkpoint without running what is in it.

DCP's ``.metadata`` is a pickle, and unpickling can call any function. Here it may name only the
types that DCP writes; anything else is refused before it is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.utils import _create_file_view
from torch.futures import Future

from torchtitan_style.common.errors import UserError

_FILES_AT_ONCE = 4

_PATHS = ("Path", "PosixPath", "WindowsPath")  # of pathlib, which is a package of its own in Python 3.13

_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """DCP warns of its own use of old types, and of a process that saves or loads by itself, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TypedStorage is deprecated.*")
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninitialized.*")
        yield


def _memory_format(owner: Any, name: str) -> Any:
    """In place of ``getattr``, by which some releases of Python 3.11 pickle the member of an enumeration."""
    if owner is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"it takes {name} from {owner}, which no checkpoint needs")
    return owner[name]


class _Unpickler(pickle.Unpickler):
    """Reads what any release of Python has written, which do not all give types the same names."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return getattr(pathlib, name)
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """DCP's reader with an allow-list for the metadata. advance: called as reading gets on, from any thread.

    A tensor that is wanted whole, as it is stored, is read straight into its place, twice as fast as by DCP, which
    reads all others, with ``weights_only``.
    """

    def __init__(self, path: Path, *, advance: Callable[[], None] = lambda: None) -> None:
        super().__init__(path)
        self._advance = advance

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self._metadata = metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)

        def read(name: str) -> list[ReadItem]:
            with (Path(self.path) / name).open("rb") as file:
                return [item for item in by_file[name] if not self._read_straight(item, file, planner)]

        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            left = list(pool.map(read, by_file))
        for items in left:  # of one file
            super().read_data(dataclasses.replace(plan, items=items), planner)
            self._advance()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_straight(self, item: ReadItem, file: Any, planner: LoadPlanner) -> bool:
        stored = self._metadata.state_dict_metadata[item.dest_index.fqn]
        if item.type != LoadItemType.TENSOR or not isinstance(stored, TensorStorageMetadata):
            return False
        target = planner.resolve_tensor(item).detach()
        chunk = next(chunk for chunk in stored.chunks if chunk.offsets == item.storage_index.offset)
        if not (
            target.is_cpu
            and target.is_contiguous()
            and target.numel()
            and target.dtype == stored.properties.dtype
            and target.shape == chunk.sizes == item.lengths
        ):
            return False
        info = self.storage_data[item.storage_index]
        # A stored tensor is a zip file, and its values an entry of it, not compressed.
        archive: Any = torch._C.PyTorchFileReader(_create_file_view(file, info.offset, info.length))  # type: ignore
        if archive.get_record_size("data/0") != target.nbytes:
            return False
        file.seek(info.offset + archive.get_record_offset("data/0"))
        values: Any = target.view(-1).view(torch.uint8).numpy()
        if file.readinto(memoryview(values)) != target.nbytes:
            raise OSError(f"{file.name} ends early")
        planner.commit_tensor(item, target)
        self._advance()
        return True

    def check_metadata(self) -> None:
        """Raise UserError unless it can be read. To be called before DCP reads it, which takes any error for a
        checkpoint of another kind."""
        self.read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path(kwargs.get("rank"))
        try:
            with self.fs.create_stream(path, "rb") as file:
                metadata: Metadata = _Unpickler(file).load()
                if not isinstance(metadata, Metadata):
                    raise pickle.UnpicklingError(f"it is a {type(metadata).__name__}")
        except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not the metadata of a checkpoint: {error}") from None
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
