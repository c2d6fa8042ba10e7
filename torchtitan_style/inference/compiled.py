"""One step of decoding, all layers for one new token of one row, as one compiled graph.

At one token a small model spends its time on calling operations, each of which reads and writes memory for little
arithmetic. Compiled, there are a few kernels per layer, in which products, norms and residuals are fused. What is
written in Python stays the model's forward: only the cache is another one, whose shapes do not change from step to
step, as a graph is compiled for shapes.

Shapes: K key/value heads, S slots of a layer's cache, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchtitan_style.models.qwen3.config import Qwen3Config
from torchtitan_style.signals import holding_interrupts

from .cache import KVCache

__all__ = ["CompiledStep"]


class CompiledStep:
    """Logits [1, 1, V] after one more token of one row, for a cache that has some already.

    model: ``fuse``d with ``compile=True``. It is compiled here and now, once for caches of any size.
    """

    def __init__(self, model: Any, config: Qwen3Config, device: torch.device) -> None:
        self._model = model
        self._compiled: Any = torch.compile(self._forward, fullgraph=True)
        cache = KVCache([config.window(layer) for layer in range(config.num_hidden_layers)], capacity=_TRIAL)
        with torch.inference_mode():
            ids = torch.zeros(1, 1, dtype=torch.long, device=device)
            model(ids, positions=cache.positions(ids), cache=cache)
            cache.advance(1)
            slots = cache.slots()
            for stored, window in zip(slots, cache.windows, strict=True):
                for x in stored if window is None else ():
                    torch._dynamo.mark_dynamic(x, 2)
            self._compiled(ids, slots, torch.tensor(cache.length, device=device))

    def __call__(self, ids: Tensor, *, cache: KVCache) -> Tensor:
        """ids: [1, 1], in inference mode. The cache is written to, and is the caller's to ``advance``."""
        # A copy, as strides count: those of a prompt's last token, alone, are the prompt's.
        ids = ids.clone(memory_format=torch.contiguous_format)
        slots, length = cache.slots(), torch.tensor(cache.length, device=ids.device)
        # A KeyboardInterrupt in a guard, which is Python called from C++, counts as a guard that fails: it is lost, and
        # all is compiled again.
        with holding_interrupts():
            logits: Tensor = self._compiled(ids, slots, length)
        return logits

    def _forward(self, ids: Tensor, slots: list[tuple[Tensor, Tensor]], length: Tensor) -> Tensor:
        logits: Tensor = self._model(ids, positions=length.view(1, 1), cache=_Slots(slots, length))
        return logits


_TRIAL = 512
"""Positions of the cache that is compiled with; more than it uses, as strides are to be variables too."""


class _Slots:
    """The cache as a graph sees it: all slots of each layer, and a mask for those that hold what may be seen.

    slots: of each layer keys and values [1, K, S, D], position i at i % S. length: positions so far, a number on the
    device: one in Python would be part of the graph.
    """

    def __init__(self, slots: list[tuple[Tensor, Tensor]], length: Tensor) -> None:
        self._slots, self._length = slots, length

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self._slots[layer]
        s = keys.shape[2]
        slot = (self._length % s)[None]
        keys.index_copy_(2, slot, k)
        values.index_copy_(2, slot, v)
        # How many positions ago a slot was written last. Those that never were would be from before the first one.
        ages = (self._length - torch.arange(s, device=k.device)) % s
        return keys, values, (ages <= self._length)[None, None, None]  # [1, 1, 1, S]
