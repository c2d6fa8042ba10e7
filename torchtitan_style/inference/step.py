"""One step of decoding, all layers for one new token of each row, without the time of calling its operations.

At one token a model spends its time on calling operations, each of which reads and writes memory for little arithmetic.
Compiled, there are a few kernels per layer, in which products, norms and residuals are fused. On a GPU, compiled or
not, the kernels of a step are recorded once as a CUDA graph and replayed for the tokens after it, as one launch.
What is written in Python stays the model's forward: only the cache is another one, whose shapes do not change from step
to step, as a graph is made for shapes.

Shapes: B rows, K key/value heads, S slots of a layer's cache, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchtitan_style.common.signals import holding_interrupts
from torchtitan_style.models.spec import ModelConfig

from .cache import KVCache, Slots

Forward = Callable[[Tensor, Slots, Tensor, Tensor], Tensor]
"""(ids [B, 1], slots, positions so far as a number on the device, padding [B]) → logits [B, 1, V]"""


class DecodingStep:
    """Logits [B, 1, V] after one more token of each row, for a cache that has some already. On a GPU they are
    overwritten by the next call.

    model: ``fuse``d, with ``compile=True`` if compile. Then there are two compiled graphs, one for a single row and one
    for any number of rows above that, both for caches of any size. Each is compiled by ``prepare`` and never again.
    replay: record the kernels of a step, on a GPU. Then the compiled graphs are of one layer, which the model compiles
    itself: what is between layers is recorded with the rest, and a graph of all of them takes a minute or more.
    """

    def __init__(
        self, model: Any, config: ModelConfig, device: torch.device, *, compile: bool, replay: bool = False
    ) -> None:
        self._model, self._device, self._compile = model, device, compile
        self._windows = config.windows
        self._compiled: dict[bool, Any] = {}  # by whether there are several rows
        self._replays = _Replays() if replay else None

    def ready(self, rows: int) -> bool:
        """Whether it can be called for so many."""
        return not self._compile or (rows > 1) in self._compiled

    def prepare(self, rows: int) -> None:
        """Compile it for so many rows, if it is to be and is not; takes a while."""
        if self.ready(rows):
            return
        several = rows > 1
        if several and self._replays is not None:
            self.prepare(1)  # for the last one that is left of them
        graph: Any = self._forward if self._replays is not None else torch.compile(self._forward, fullgraph=True)
        cache = KVCache(self._windows, capacity=_TRIAL)
        with torch.inference_mode():
            ids = torch.zeros(2 if several else 1, 1, dtype=torch.long, device=self._device)
            self._model(ids, positions=cache.positions(ids), cache=cache)
            cache.advance(1)
            slots, padding = cache.slots(), cache.padding(ids)
            if self._replays is None:
                self._open_sizes(ids, padding, slots, cache.windows)
            graph(ids, slots, torch.tensor(cache.length, device=self._device), padding)
        self._compiled[several] = graph

    @staticmethod
    def _open_sizes(ids: Tensor, padding: Tensor, slots: Slots, windows: list[int | None]) -> None:
        """Tell the compiler which sizes change from call to call. One of 1 it does not leave open."""
        several = len(ids) > 1
        for stored, window in zip(slots, windows, strict=True):
            for x in stored:
                torch._dynamo.mark_dynamic(x, [0] * several + [2] * (window != 1))
        for x in (ids, padding) if several else ():
            torch._dynamo.mark_dynamic(x, 0)

    def __call__(self, ids: Tensor, *, cache: KVCache) -> Tensor:
        """ids: [B, 1], in inference mode. The cache is written to, and is the caller's to ``advance``."""
        forward = self._compiled[len(ids) > 1] if self._compile else self._forward
        # A KeyboardInterrupt in a guard, which is Python called from C++, counts as a guard that fails: it is lost, and
        # all is compiled again.
        with holding_interrupts():
            if self._replays is not None:
                return self._replays(forward, ids, cache)
            # Copies, as strides count, and whether they were made in inference mode: those of a prompt's last token,
            # alone, are the prompt's.
            padding = cache.padding(ids).clone()
            ids = ids.clone(memory_format=torch.contiguous_format)
            logits: Tensor = forward(ids, cache.slots(), torch.tensor(cache.length, device=ids.device), padding)
        return logits

    def _forward(self, ids: Tensor, slots: Slots, length: Tensor, padding: Tensor) -> Tensor:
        real = (length - padding)[:, None]  # [B, 1], positions so far without padding
        logits: Tensor = self._model(ids, positions=real, cache=_SlotCache(slots, length, real))
        return logits


_TRIAL = 512
"""Positions of the cache that is compiled with; more than it uses, as strides are to be variables too."""


class _Replays:
    """The step as a CUDA graph, recorded anew when the cache has other storage, more slots or other rows. For one text
    or batch at a time: the tensors that a graph reads and writes are its own.

    The first step after such a change runs as it is, which also prepares what may not be prepared while recording.
    """

    _LEAST = 256
    """Slots that a step sees are a multiple of it, from 4,096 on of a sixteenth to an eighth of them: a mask hides the
    empty ones, at the cost of reading them, and for more of them a graph is recorded anew, at the cost of a plain
    step."""
    _KEPT = 16
    """Graphs whose memory is kept before it is given back, which takes as long as a step."""

    def __init__(self) -> None:
        self._key: object = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._recorded = 0

    def __call__(self, forward: Forward, ids: Tensor, cache: KVCache) -> Tensor:
        slots = cache.slots(self._LEAST * max(1, cache.length // (8 * self._LEAST)))
        key = (cache.storage, max(keys.shape[2] for keys, _ in slots), len(ids))
        if key != self._key:
            self._key = self._graph = None
            self._ids = ids.clone(memory_format=torch.contiguous_format)
            self._length = torch.full((), cache.length, device=ids.device)
            self._padding = cache.padding(ids).clone()
            self._logits = forward(self._ids, slots, self._length, self._padding)
            self._key = key
            return self._logits
        self._ids.copy_(ids)
        self._length.fill_(cache.length)
        if self._graph is None:
            self._record(forward, slots)
        assert self._graph is not None
        self._graph.replay()
        return self._logits

    def _record(self, forward: Forward, slots: Slots) -> None:
        # torch.cuda.graph gives back all free memory each time, which takes longer than the step.
        self._recorded += 1
        if self._recorded % self._KEPT == 0:
            torch.cuda.empty_cache()
        with torch.cuda.device(self._ids.device):
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(self._stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._logits = forward(self._ids, slots, self._length, self._padding)
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(self._stream)
        self._graph = graph


class _SlotCache:
    """The cache as a graph sees it: all slots of each layer, and a mask for those that hold what may be seen.

    slots: of each layer keys and values [B, K, S, D], position i at i % S. length: positions so far, a number on the
    device: one in Python would be part of the graph. real: how many of them are no padding, [B, 1].
    """

    def __init__(self, slots: Slots, length: Tensor, real: Tensor) -> None:
        self._slots, self._length, self._real = slots, length, real
        self._places: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, slot, mask = self.place(layer)
        keys.index_copy_(2, slot, k)
        values.index_copy_(2, slot, v)
        return keys, values, mask

    def place(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values [B, K, S, D] of ``layer``, the slot [1] of the new ones, and a mask [B, 1, 1, S]."""
        keys, values = self._slots[layer]
        s = keys.shape[2]
        if torch.compiler.is_compiling():  # to which sizes are symbols, and what is equal one thing
            return keys, values, *self._at(s)
        if s not in self._places:
            self._places[s] = self._at(s)
        return keys, values, *self._places[s]

    def _at(self, s: int) -> tuple[Tensor, Tensor]:
        """Of ``s`` slots, that of the new position [1], and which may be seen, [B, 1, 1, S]."""
        # How many positions ago a slot was written last. Those that never were would be from before the first one.
        ages = (self._length - torch.arange(s, device=self._length.device)) % s
        return (self._length % s)[None], (ages <= self._real)[:, None, None]
