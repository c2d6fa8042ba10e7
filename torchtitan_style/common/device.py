"""The device that this process computes on, and everything that differs between CPU and CUDA."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time

import torch

from .memory import host_memory

# Dense bf16 FLOP/s from the vendors' data sheets, by a part of the device's name; the first match counts.
_PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def current_device() -> torch.device:
    """This process's GPU (by LOCAL_RANK) if there are GPUs, else the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def backend(device: torch.device) -> str:
    """Name of the process-group backend for ``device``."""
    return "nccl" if device.type == "cuda" else "gloo"


def name(device: torch.device) -> str:
    """A readable name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' if threads > 1 else ''})"


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that matrix multiplication in ``dtype`` can reach, or None if unknown.

    From the data sheet on CUDA, for bf16; measured on CPU, with the threads of this process, in about a fifth of a
    second, and in fp32 where that is what ``dtype`` is multiplied in.

    On CPU it is the mean of a few products, not the fastest: of processes that share a core, one may have it alone for
    a moment, and the sum of such moments is more than the core can do.
    """
    if device.type == "cuda":
        known = (peak for part, peak in _PEAK_BF16.items() if part in torch.cuda.get_device_name(device))
        return next(known, None) if dtype == torch.bfloat16 else None
    if not is_fast(dtype, device):
        dtype = torch.float32
    size, products = 1024, 5
    a = torch.ones(size, size, dtype=dtype)
    a @ a
    start = time.perf_counter()
    for _ in range(products):
        a @ a
    return 2 * size**3 * products / (time.perf_counter() - start)


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it itself, else fp32."""
    return torch.bfloat16 if is_fast(torch.bfloat16, device) else torch.float32


def is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies matrices of ``dtype`` (bf16, fp16, fp32) itself, and not by way of fp32."""
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    supported = ops._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported
    return bool(supported())


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: reserved by the allocator on CUDA, resident in RAM on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def available_memory(device: torch.device) -> int:
    """Bytes that are free on the device: on CPU, in the machine and in this process's control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    room = host_memory()
    return 2**32 if room is None else room.free


def use_deterministic_algorithms() -> None:
    """Make every operation bitwise reproducible, or raise."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None if it can."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "the triton package is missing"
        return None
    compiler = os.environ.get("CXX")
    if not any(shutil.which(c) for c in ([compiler] if compiler else ["g++", "clang++", "c++"])):
        return "there is no C++ compiler (g++ or clang++) on this machine"
    return None
