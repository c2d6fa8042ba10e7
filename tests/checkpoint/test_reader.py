"""A checkpoint's metadata is a pickle: only DCP's own types may be in it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from torchtitan_style.checkpoint.reader import SafeReader
from torchtitan_style.errors import UserError


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


def test_does_not_run_what_is_in_the_metadata(tmp_path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Malicious(canary)))
    with pytest.raises(UserError, match="which no checkpoint needs"):
        SafeReader(tmp_path).read_metadata()
    assert not canary.exists()
    # The canary is a real one: an ordinary unpickler runs it.
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert canary.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps([1, 2])[:-1]])
def test_a_damaged_file_is_named(tmp_path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="not the metadata of a checkpoint"):
        SafeReader(tmp_path).read_metadata()
