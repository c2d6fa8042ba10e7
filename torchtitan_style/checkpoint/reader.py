"""Reading a DCP checkpoint without running what is in it.

DCP's ``.metadata`` is a pickle, and unpickling can call any function. Here it may name only the
types that DCP writes; anything else is refused before it is imported.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from torchtitan_style.errors import UserError

__all__ = ["SafeReader", "without_warnings"]

_ALLOWED = {
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """DCP's reader with an allow-list for the metadata. Tensors are read with ``weights_only`` by DCP itself."""

    def check_metadata(self) -> None:
        """Raise UserError unless it can be read. To be called before DCP reads it, which takes any error for a
        checkpoint of another kind."""
        self.read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path(kwargs.get("rank"))
        try:
            with self.fs.create_stream(path, "rb") as file:
                metadata: Metadata = _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise UserError(f"{path}: not the metadata of a checkpoint: {error}") from None
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
