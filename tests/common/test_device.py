"""What is chosen for CUDA, as far as it can be told without a GPU."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from torchtitan_style.common import device as devices


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One visible GPU; what it is asked to be is noted."""
    noted: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: noted.update(device=device))
    return noted


def test_a_rank_that_sees_one_gpu_takes_it(gpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert devices.current_device() == torch.device("cuda", 0)
    assert gpus["device"] == torch.device("cuda", 0)


def test_objects_are_not_sent_over_nccl() -> None:
    assert devices.backend(torch.device("cuda", 0)) == "cpu:gloo,cuda:nccl"
    assert devices.backend(torch.device("cpu")) == "gloo"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA H1000", None),
    ],
)
def test_peaks_are_looked_up_by_the_whole_name(name: str, peak: float | None) -> None:
    assert devices.peak_by_name(name) == peak


def test_cudnn_attention_is_switched_off_and_on_again() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with devices.without_cudnn_attention():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_triton_is_needed_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    assert "triton package is missing" in str(devices.compiler_problem(torch.device("cuda")))


@pytest.mark.parametrize(("kind", "variable", "language"), [("cuda", "CC", "C"), ("cpu", "CXX", "C++")])
def test_what_compiling_needs(
    kind: str, variable: str, language: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = torch.device(kind)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv(variable, str(tmp_path / "no-compiler"))
    assert f"there is no {language} compiler" in str(devices.compiler_problem(device))
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv(variable, str(compiler))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in str(devices.compiler_problem(device))
    (tmp_path / "Python.h").touch()
    assert devices.compiler_problem(device) is None
