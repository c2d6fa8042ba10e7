"""How torch is told to use the memory of GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT

# Prints the setting at the moment when torch is first imported.
TRAIN = """
import os, sys
from torchtitan_style.commands import train

class First:
    @staticmethod
    def find_spec(name, *_):
        if name == "torch":
            print({name: value for name, value in os.environ.items() if name.endswith("_ALLOC_CONF")}, flush=True)
            os._exit(0)

sys.meta_path.insert(0, First)
train.main(["--model.flavor", "debug"])
"""


@pytest.mark.parametrize(
    "own", [{}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}]
)
def test_segments_are_expandable_unless_the_user_says_otherwise(tmp_path: Path, own: dict[str, str]) -> None:
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    expected = own or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for environment in (ENVIRONMENT, ENVIRONMENT | rank):  # a process by itself, and one that torchrun has started
        options = {"env": environment | own, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60}
        result = subprocess.run([sys.executable, "-c", TRAIN], **options)
        assert result.stdout.splitlines()[-1:] == [str(expected)], result
