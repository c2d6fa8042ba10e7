"""A checkpoint's metadata is a pickle: only DCP's own types may be in it."""

from __future__ import annotations

import enum
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from torchtitan_style.checkpoint.reader import SafeReader
from torchtitan_style.common.errors import UserError


class Malicious:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_reads_what_dcp_writes(tmp_path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(7)}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    found = {name: torch.zeros_like(value) for name, value in tensors.items()}
    dcp.load(found, storage_reader=SafeReader(tmp_path), no_dist=True)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_what_cannot_be_read_into_its_place_is_read_beside_it_at_once(tmp_path, monkeypatch) -> None:
    """As what is on a GPU."""
    dcp.save({"a": torch.arange(6.0).view(2, 3)}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    found = {"a": torch.zeros(3, 2).T}
    monkeypatch.setattr(SafeReader, "_read_part", lambda *_: pytest.fail("read one after the other"))
    dcp.load(found, storage_reader=SafeReader(tmp_path), no_dist=True)
    assert found["a"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


class Pickler311(pickle.Pickler):
    """Gives members of enumerations as Python 3.11.2 does."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def other_pythons(metadata: Metadata) -> list[bytes]:
    """The pickle of ``metadata`` by other releases of Python."""
    older = io.BytesIO()
    Pickler311(older).dump(metadata)
    newer = pickle.dumps(metadata).replace(b"\x8c\x07pathlib", b"\x8c\x0epathlib._local")  # 3.13
    return [older.getvalue(), newer]


def test_reads_what_other_releases_of_python_write(tmp_path) -> None:
    dcp.save({"a": torch.ones(2)}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    file = tmp_path / ".metadata"
    written = pickle.loads(file.read_bytes())
    for content, sign in zip(other_pythons(written), (b"getattr", b"pathlib._local"), strict=True):
        assert sign in content
        file.write_bytes(content)
        found = SafeReader(tmp_path).read_metadata()
        assert found.state_dict_metadata == written.state_dict_metadata
        assert found.storage_data == written.storage_data


class Reaching:
    def __reduce__(self):
        return getattr, (Metadata, "__init__")


def test_reaches_into_nothing_but_the_enumeration(tmp_path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Reaching()))
    with pytest.raises(UserError, match="expected a Metadata, found a getattr"):
        SafeReader(tmp_path).read_metadata()


def test_does_not_run_what_is_in_the_metadata(tmp_path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Malicious(canary)))
    with pytest.raises(UserError, match="which is not allowed in a checkpoint"):
        SafeReader(tmp_path).read_metadata()
    assert not canary.exists()
    # The canary is a real one: an ordinary unpickler runs it.
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert canary.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps([1, 2]), pickle.dumps([1, 2])[:-1]])
def test_a_damaged_file_is_named(tmp_path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="not the metadata of a checkpoint"):
        SafeReader(tmp_path).read_metadata()
