"""Matrix products and attention in bf16 and fp16 on CPUs that have no instructions for them.

Without AVX-512 or AMX, as on many laptops, torch multiplies such matrices in loops of its own: a training step took 60
times as long as in fp32 (measured: docs/performance.md). Here the operands are multiplied in fp32, which holds them
exactly, and the result is rounded: the same sums of the same products, added up in fp32 as the instructions do it. So
"bfloat16" means the same on every CPU, and is about as fast as fp32 where it cannot be faster.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchtitan_style.common.device import is_fast

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"

_FEW_ROWS = 4
"""Up to so many rows times a matrix that is read by rows, as when text is generated, torch's own loops are faster:
they read half of the bytes (6144 × 1024: 0.8 ms for one row, 3.9 by way of fp32; 2.9 and 7.7 for four)."""

_slow: set[torch.dtype] = set()
"""What this process multiplies in fp32."""

_library: Any = None


def multiply_in_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Have this process multiply matrices of ``dtype`` in fp32, if ``device`` is a CPU without instructions for it.
    Whether it does."""
    if device.type != "cpu" or is_fast(dtype, device):
        return False
    if not _slow:
        _install()
    _slow.add(dtype)
    return True


def _install() -> None:
    global _library
    _library = torch.library.Library("aten", "IMPL")  # what it registers is gone when it is
    for name in _PRODUCTS:
        _replace(name, "default")
        _replace(name, "out")
    for name in (_ATTENTION, f"{_ATTENTION}_backward"):
        _replace(name, "default")


def _replace(name: str, overload: str) -> None:
    """Register a CPU kernel that computes in fp32 what is of the types ``_slow``, and leaves the rest to torch's."""
    torchs = torch.library.get_kernel(f"aten::{name}" + ("" if overload == "default" else f".{overload}"), "CPU")
    in_fp32: Callable[..., Any] = getattr(torch.ops.aten, name).default

    def kernel(keys: Any, *inputs: Any, **named: Any) -> Any:
        dtype = inputs[0].dtype
        if dtype not in _slow or _has_few_rows(name, inputs):
            return torchs.call_boxed(keys, *inputs, **named)
        out = named.pop("out", None)
        result = in_fp32(*map(_widened, inputs), **{key: _widened(x) for key, x in named.items()})
        if out is not None:
            return out.copy_(result)
        if isinstance(result, Tensor):
            return result.to(dtype)
        # Attention's logarithms of sums of exponentials are fp32 in any case.
        return tuple(x.to(dtype) for x in result) if name.endswith("backward") else (result[0].to(dtype), result[1])

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*[Oo]verrid")
        _library.impl(name if overload == "default" else f"{name}.{overload}", kernel, "CPU", with_keyset=True)


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def _has_few_rows(name: str, inputs: tuple[Any, ...]) -> bool:
    """Whether it is a product of a few rows [N, K] and a matrix [K, M] that is the transpose of one in rows."""
    if name not in ("mm", "addmm"):
        return False
    rows, matrix = inputs[-2:]
    return bool(rows.shape[0] <= _FEW_ROWS and matrix.stride(0) == 1)
