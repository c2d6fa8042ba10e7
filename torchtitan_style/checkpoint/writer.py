"""Writing a rank's part of a checkpoint, hashed on the way to the disk.

torch.distributed.checkpoint (DCP) plans who writes what, and reads it again. This takes the place of its file
writer, which does not hash, can take a write that failed in a helper thread for a success, and keeps every
tensor of a file in memory until the file is closed. The format is the same.
"""

from __future__ import annotations

import concurrent.futures
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

FILE_SIZE = 256 * 2**20
"""Bytes after which a rank begins another file: files are verified side by side."""


class HashingWriter(dcp.FileSystemWriter):
    """Writes into ``folder``. ``entries`` is what the manifest says of this rank's files.

    advance: called after every tensor. max_file_size: bytes, unless one tensor has more. one_at_a_time: begin a file
    when the one before is on disk, and its tensors are needed no more.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        advance: Callable[[], None] = lambda: None,
        max_file_size: int = FILE_SIZE,
        one_at_a_time: bool = False,
    ) -> None:
        super().__init__(folder, thread_count=1, sync_files=True)
        self.advance, self.max_file_size, self.one_at_a_time = advance, max_file_size, one_at_a_time
        self.entries: dict[str, dict[str, Any]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        with_crc = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # the hash covers more, and this takes half of the time
        files: dict[str, _HashedFile] = {}
        try:
            items = list(plan.items)
            while items:
                name = f"{plan.storage_data.prefix}{len(files)}.distcp"
                file = files[name] = _HashedFile(Path(self.path) / name)
                while items and (file.size == 0 or file.size < self.max_file_size):
                    results.append(_write(file, name, items.pop(0), planner))
                    self.advance()
                file.end()
                if self.one_at_a_time:
                    file.entry()  # waits for it
                    file.close()
            self.entries = {name: file.entry() for name, file in files.items()}
        finally:
            torch.serialization.set_crc32_options(with_crc)
            for file in files.values():
                file.close()
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
            file.read_later.append(tensor)
            torch.save(tensor, file)  # type: ignore[arg-type]
        else:
            file.write(data.getvalue())
    except RuntimeError as error:
        raise file.failure or error from None  # torch's own complaint hides the cause
    length = file.size - start
    return WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, start, length))


class _HashedFile(io.RawIOBase):
    """A new file, hashed by a thread of its own that may lag behind, and then sees to it that it is on disk, while the
    next file is written already."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self.failure: OSError | None = None
        self.read_later: list[Tensor] = []
        """Whose memory is still to be hashed: as much as the file has."""
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._small = bytearray()
        """What is too little to wake the thread for."""
        self._thread = ThreadPoolExecutor(1)
        self._tasks: list[concurrent.futures.Future[None]] = []

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.failure = error
            raise
        if len(view) < 2**16:
            self._small += view
        else:  # a tensor's values, where the tensor has them
            self._hash_small()
            self._tasks.append(self._thread.submit(self._digest.update, view))
        self.size += len(view)
        return len(view)

    def _hash_small(self) -> None:
        if self._small:
            self._tasks.append(self._thread.submit(self._digest.update, bytes(self._small)))
            self._small.clear()

    def writable(self) -> bool:
        return True

    def end(self) -> None:
        """Nothing more will be written."""
        self._hash_small()
        self._tasks.append(self._thread.submit(self._sync))

    def _sync(self) -> None:
        self.read_later.clear()
        self._file.flush()
        os.fsync(self._file.fileno())

    def entry(self) -> dict[str, Any]:
        """What the manifest says of it, once it is on disk. Raises OSError if it could not get there."""
        for task in self._tasks:
            task.result()
        return {"size": self.size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._thread.shutdown()
        self._file.close()


class StagedPlanner(dcp.DefaultSavePlanner):
    """Plans from the tensors of a state dict, and takes the values from copies of this rank's parts of them."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.copies = copies

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self.copies[write_item.index.fqn]
