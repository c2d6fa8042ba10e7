"""One step of decoding, all layers for one new token of each row, as one compiled graph.

At one token a small model spends its time on calling operations, each of which reads and writes memory for little
arithmetic. Compiled, there are a few kernels per layer, in which products, norms and residuals are fused. What is
written in Python stays the model's forward: only the cache is another one, whose shapes do not change from step to
step, as a graph is compiled for shapes.

Shapes: B rows, K key/value heads, S slots of a layer's cache, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchtitan_style.common.signals import holding_interrupts
from torchtitan_style.models.spec import ModelConfig

from .cache import KVCache


class CompiledStep:
    """Logits [B, 1, V] after one more token of each row, for a cache that has some already.

    model: ``fuse``d with ``compile=True``. There are two graphs, one for a single row and one for any number of rows
    above that, both for caches of any size. Each is compiled by ``prepare`` and never again.
    """

    def __init__(self, model: Any, config: ModelConfig, device: torch.device) -> None:
        self._model, self._device = model, device
        self._windows = config.windows
        self._graphs: dict[bool, Any] = {}  # by whether there are several rows

    def ready(self, rows: int) -> bool:
        """Whether it is compiled for so many."""
        return (rows > 1) in self._graphs

    def prepare(self, rows: int) -> None:
        """Compile it for so many rows, if it is not; takes a while."""
        if self.ready(rows):
            return
        several = rows > 1
        graph: Any = torch.compile(self._forward, fullgraph=True)
        cache = KVCache(self._windows, capacity=_TRIAL)
        with torch.inference_mode():
            ids = torch.zeros(2 if several else 1, 1, dtype=torch.long, device=self._device)
            self._model(ids, positions=cache.positions(ids), cache=cache)
            cache.advance(1)
            slots, padding = cache.slots(), cache.padding(ids)
            for stored, window in zip(slots, cache.windows, strict=True):
                for x in stored:
                    torch._dynamo.mark_dynamic(x, [0] * several + [2] * (window != 1))  # a size of 1 is not left open
            for x in (ids, padding) if several else ():
                torch._dynamo.mark_dynamic(x, 0)
            graph(ids, slots, torch.tensor(cache.length, device=self._device), padding)
        self._graphs[several] = graph

    def __call__(self, ids: Tensor, *, cache: KVCache) -> Tensor:
        """ids: [B, 1], in inference mode. The cache is written to, and is the caller's to ``advance``."""
        # Copies, as strides count, and whether they were made in inference mode: those of a prompt's last token, alone,
        # are the prompt's.
        padding = cache.padding(ids).clone()
        ids = ids.clone(memory_format=torch.contiguous_format)
        slots, length = cache.slots(), torch.tensor(cache.length, device=ids.device)
        # A KeyboardInterrupt in a guard, which is Python called from C++, counts as a guard that fails: it is lost, and
        # all is compiled again.
        with holding_interrupts():
            logits: Tensor = self._graphs[len(ids) > 1](ids, slots, length, padding)
        return logits

    def _forward(self, ids: Tensor, slots: list[tuple[Tensor, Tensor]], length: Tensor, padding: Tensor) -> Tensor:
        real = (length - padding)[:, None]  # [B, 1], positions so far without padding
        logits: Tensor = self._model(ids, positions=real, cache=_Slots(slots, length, real))
        return logits


_TRIAL = 512
"""Positions of the cache that is compiled with; more than it uses, as strides are to be variables too."""


class _Slots:
    """The cache as a graph sees it: all slots of each layer, and a mask for those that hold what may be seen.

    slots: of each layer keys and values [B, K, S, D], position i at i % S. length: positions so far, a number on the
    device: one in Python would be part of the graph. real: how many of them are no padding, [B, 1].
    """

    def __init__(self, slots: list[tuple[Tensor, Tensor]], length: Tensor, real: Tensor) -> None:
        self._slots, self._length, self._real = slots, length, real

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self._slots[layer]
        s = keys.shape[2]
        slot = (self._length % s)[None]
        keys.index_copy_(2, slot, k)
        values.index_copy_(2, slot, v)
        # How many positions ago a slot was written last. Those that never were would be from before the first one.
        ages = (self._length - torch.arange(s, device=k.device)) % s
        return keys, values, (ages <= self._real)[:, None, None]  # [B, 1, 1, S]
