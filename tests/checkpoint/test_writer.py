"""Files that are hashed as they are written, and the copies that they are written from."""

from __future__ import annotations

import hashlib
import os
import resource
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan_style.checkpoint import staging as staging_module
from torchtitan_style.checkpoint.staging import Staging
from torchtitan_style.checkpoint.writer import HashingWriter, StagedPlanner


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "large": torch.randn(300, 300),
        "view": torch.randn(100, 64)[10:20],
        "bfloat16": torch.randn(77, dtype=torch.bfloat16),
        "number": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        **{f"small{i}": torch.full((1000,), float(i)) for i in range(8)},
    }


def save(folder: Path, values: dict[str, torch.Tensor], **options) -> HashingWriter:
    writer = HashingWriter(folder, **options)
    dcp.save(values, storage_writer=writer, no_dist=True)
    return writer


@pytest.mark.parametrize(("size", "files"), [(2**28, 1), (10_000, range(4, 8)), (1, 13)])
def test_entries_are_those_of_the_files_and_dcp_reads_them(tmp_path: Path, size: int, files) -> None:
    values, calls = tensors(), []
    writer = save(tmp_path / "a", values, max_file_size=size, advance=lambda: calls.append(1))
    found = {path.name: path.read_bytes() for path in (tmp_path / "a").glob("*.distcp")}
    assert writer.entries == {
        name: {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()} for name, raw in found.items()
    }
    assert len(found) in (files if isinstance(files, range) else (files,))
    assert len(calls) == len(values)
    back = {name: torch.full_like(value, 3) for name, value in values.items()}
    dcp.load(back, storage_reader=dcp.FileSystemReader(tmp_path / "a"), no_dist=True)
    assert all(torch.equal(back[name], value) for name, value in values.items())
    # A view is not written with all that it is a part of.
    assert sum(map(len, found.values())) < 300 * 300 * 4 + 8 * 4000 + 640 * 4 + 13 * 2000


def test_what_the_system_says_surfaces_as_it_is(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointException) as caught:
            save(tmp_path / "a", tensors())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (error, _) = caught.value.failures[0]
    assert isinstance(error, OSError), repr(error)
    assert error.strerror == "File too large"
    assert torch.serialization.get_crc32_options() is True


def test_files_are_on_disk_before_they_are_reported(tmp_path: Path, monkeypatch) -> None:
    synced, real = [], os.fsync
    monkeypatch.setattr("os.fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    writer = save(tmp_path / "a", tensors(), max_file_size=10_000)
    assert {str(tmp_path / "a" / name) for name in writer.entries} <= set(synced)


def test_copies_do_not_change_with_the_tensors(tmp_path: Path) -> None:
    values, staging = tensors(), Staging()
    copies = staging.copy(values)
    was = {name: value.clone() for name, value in values.items()}
    for value in values.values():
        value.fill_(9)
    assert all(torch.equal(copies[name], was[name]) for name in was)
    dcp.save(values, storage_writer=HashingWriter(tmp_path), planner=StagedPlanner(copies), no_dist=True)
    back = {name: torch.empty_like(value) for name, value in values.items()}
    dcp.load(back, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    assert all(torch.equal(back[name], was[name]) for name in was)
    again = staging.copy(values)
    assert all(again[name].data_ptr() == copies[name].data_ptr() for name in copies)
    assert all((again[name] == 9).all() for name in again)


def test_copies_lie_in_one_buffer_without_large_gaps() -> None:
    values = tensors()
    staging = Staging()
    copies = staging.copy(values)
    sizes = [value.nbytes for value in values.values()]
    start, end = staging._buffer.data_ptr(), staging._buffer.data_ptr() + staging._buffer.nbytes
    assert sum(sizes) <= staging._buffer.nbytes < sum(sizes) + 64 * len(sizes)
    spans = sorted((copy.data_ptr(), copy.data_ptr() + copy.nbytes) for copy in copies.values() if copy.nbytes)
    assert start <= spans[0][0]
    assert spans[-1][1] <= end
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    for name, copy in copies.items():
        assert (copy.shape, copy.dtype) == (values[name].shape, values[name].dtype)
        assert copy.nbytes == copy.untyped_storage().nbytes()  # else it would be copied again when it is written
        assert copy.data_ptr() % 64 == 0


def test_other_tensors_get_another_buffer() -> None:
    staging = Staging()
    staging.copy({"a": torch.ones(3)})
    copies = staging.copy({"a": torch.ones(5), "b": torch.zeros(2)})
    assert copies["a"].tolist() == [1.0] * 5
    assert copies["b"].tolist() == [0.0] * 2


def test_what_gpus_copy_into_is_registered_once_and_released(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            calls.append(("register", size))
            return 0

        def cudaHostUnregister(self, address: int) -> None:
            calls.append(("release", address))

    monkeypatch.setattr("torch.cuda.cudart", Runtime)
    monkeypatch.setattr("torch.cuda.check_error", lambda status: calls.append(("status", status)))
    buffer = torch.empty(300, dtype=torch.uint8)
    address = buffer.data_ptr()
    staging_module._pin(buffer)
    assert calls == [("register", 300), ("status", 0)]
    del buffer
    assert calls[2:] == [("release", address)]
