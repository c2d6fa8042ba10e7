"""Graphs as the compiler has them, run by torch's own kernels: g++ takes most of the time of a compiled one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch


def traced(backend: str = "aot_eager") -> AbstractContextManager[Any]:
    """What is given to ``torch.compile`` inside is traced, differentiated unless ``backend`` is "eager", and not
    compiled."""
    compile = torch.compile

    def trace(function: Callable[..., Any] | None = None, *, options: Any = None, **named: Any) -> Any:
        return compile(function, backend=backend, **named)

    return mock.patch("torch.compile", trace)
