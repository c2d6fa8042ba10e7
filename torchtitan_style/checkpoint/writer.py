"""Writing a rank's part of a checkpoint, hashed on the way to the disk.

torch.distributed.checkpoint (DCP) plans who writes what, and reads it again. This takes the place of its file
writer, which does not hash, can take a write that failed in a helper thread for a success, and keeps every
tensor of a file in memory until the file is closed. The format is the same.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

__all__ = ["HashingWriter", "StagedPlanner"]

FILE_SIZE = 256 * 2**20
"""Bytes after which a rank begins another file: files are verified side by side."""


class HashingWriter(dcp.FileSystemWriter):
    """Writes into ``folder``. ``entries`` is what the manifest says of this rank's files.

    advance: called after every tensor. max_file_size: bytes, unless one tensor has more.
    """

    def __init__(
        self, folder: str | Path, *, advance: Callable[[], None] = lambda: None, max_file_size: int = FILE_SIZE
    ) -> None:
        super().__init__(folder, thread_count=1, sync_files=True)
        self.advance, self.max_file_size = advance, max_file_size
        self.entries: dict[str, dict[str, Any]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        prefix = plan.storage_data.prefix
        results: list[WriteResult] = []
        with_crc = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # the hash covers more, and this takes half of the time
        try:
            items = list(plan.items)
            while items:
                name = f"{prefix}{len(self.entries)}.distcp"
                with _HashedFile(Path(self.path) / name) as file:
                    while items and (file.size == 0 or file.size < self.max_file_size):
                        results.append(_write(file, name, items.pop(0), planner))
                        self.advance()
                self.entries[name] = {"size": file.size, "sha256": file.sha256}
        finally:
            torch.serialization.set_crc32_options(with_crc)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _write(file: _HashedFile, name: str, item: WriteItem, planner: SavePlanner) -> WriteResult:
    data = planner.resolve_data(item)
    start = file.size
    try:
        if isinstance(data, Tensor):
            tensor = data.detach().cpu()
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()  # torch.save would write all of what it is a part of
            torch.save(tensor, file)  # type: ignore[arg-type]
        else:
            file.write(data.getbuffer())
    except RuntimeError as error:
        raise file.failure or error from None  # torch's own complaint hides the cause
    length = file.size - start
    return WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, start, length))


class _HashedFile(io.RawIOBase):
    """A new file that is hashed while it is written, and on disk when it is closed without an error."""

    def __init__(self, path: Path) -> None:
        self.size, self.sha256 = 0, ""
        self.failure: OSError | None = None
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            if len(view) < 2**16:  # not worth waking up a thread
                self._digest.update(view)
                self._file.write(view)
            else:
                hashed = self._hasher.submit(self._digest.update, view)  # lets go of Python's lock, as writing does
                try:
                    self._file.write(view)
                finally:
                    hashed.result()  # the memory is the caller's again when this returns
        except OSError as error:
            self.failure = error
            raise
        self.size += len(view)
        return len(view)

    def writable(self) -> bool:
        return True

    def __exit__(self, kind: Any, *_: object) -> None:
        self._hasher.shutdown()
        self.sha256 = self._digest.hexdigest()
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())


class StagedPlanner(dcp.DefaultSavePlanner):
    """Plans from the tensors of a state dict, and takes the values from copies of this rank's parts of them."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.copies = copies

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self.copies[write_item.index.fqn]
