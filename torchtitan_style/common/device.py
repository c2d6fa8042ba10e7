"""The device that this process computes on, and everything that differs between CPU and CUDA."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import resource
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from .memory import host_memory

# Dense bf16 FLOP/s from the vendors' data sheets, by the device's whole name.
_PEAK_BF16 = {
    "B300": 2250e12,
    "B200": 2250e12,  # also as GB200
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "GH200": 989e12,
    "GB200": 2500e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 FLOP/s with fp32 accumulation, from the vendors' data sheets, by words of the name. Of several
names that fit, the longest counts."""


def current_device() -> torch.device:
    """This process's GPU (by LOCAL_RANK) if there are GPUs, else the CPU."""
    if torch.cuda.is_available():
        # Launchers that show each rank one GPU alone, as SLURM's --gpus-per-task does, still count LOCAL_RANK up.
        index = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        # Of the compiler: what is to be computed in fp32 is, and how it divides a sum is its own affair.
        warnings.filterwarnings("ignore", message=r"\s*(TensorFloat32 tensor cores|Online softmax is disabled)")
        return device
    return torch.device("cpu")


def backend(device: torch.device) -> str:
    """Name of the process-group backend for ``device``.

    With both, torch sends objects over gloo. Over NCCL they would be copied to the GPU, and a rank that waits for one
    would hear neither signals nor that its peer has died.
    """
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


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
        return peak_by_name(torch.cuda.get_device_name(device)) if dtype == torch.bfloat16 else None
    if not is_fast(dtype, device):
        dtype = torch.float32
    size, products = 1024, 5
    a = torch.ones(size, size, dtype=dtype)
    a @ a
    start = time.perf_counter()
    for _ in range(products):
        a @ a
    return 2 * size**3 * products / (time.perf_counter() - start)


def peak_by_name(name: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU called ``name``, or None if it is not in the table."""
    words = re.split(r"[\s-]+", name)
    runs = {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    return _PEAK_BF16.get(max(runs & _PEAK_BF16.keys(), key=len, default=""))


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Attention by torch's other kernels meanwhile; no effect on CPU.

    cuDNN's is torch's first choice on Hopper. It gives NaN in the gradient of q with a mask tensor when T mod 128 = 64
    (pytorch issue 196678), and wrong results with fewer than 8 key/value heads in decoding (193893); and it makes a
    plan for every new shape, which in decoding is every token.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


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
    """Bytes that are free on the device: on CUDA also what torch holds in reserve, on CPU in the machine and in this
    process's control group."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    room = host_memory()
    return 2**32 if room is None else room.free


def use_deterministic_algorithms() -> None:
    """Make every operation bitwise reproducible, or raise."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None if it can."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the triton package is missing"
        compiler, usual, needed = os.environ.get("CC"), ["gcc", "clang", "cc"], "C compiler (gcc or clang)"
    else:
        compiler, usual, needed = os.environ.get("CXX"), ["g++", "clang++", "c++"], "C++ compiler (g++ or clang++)"
    if not any(shutil.which(c) for c in ([compiler] if compiler else usual)):
        return f"there is no {needed} on this machine"
    # Kernels for CPUs, and Triton's loader of those for GPUs, are extensions of Python.
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "there is no Python.h for this Python (python3-dev has it)"
    return None
