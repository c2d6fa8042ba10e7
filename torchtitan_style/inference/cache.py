"""Keys and values of the positions so far, so that each new token costs one position and not all of them.

A cache belongs to who generates, and is passed into the model's forward, which calls ``update`` once per
attention layer. It holds key/value heads only (under tensor parallelism this rank's): per token

    2 · layers · key/value heads · head size · bytes per number

Rows of different lengths are padded on the left, so that their last tokens stand side by side.

Shapes: B rows, T new positions, S positions that the cache returns, K key/value heads, D head size.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_style.models.spec import ModelConfig

_BLOCK = 256
"""Positions that the storage grows by, at least."""

Slots = list[tuple[Tensor, Tensor]]
"""Of each layer, keys and values [B, K, S, D]."""

_SLOTS = 64
"""Slots that a compiled step is given are a multiple of it: it attends to all of them."""

_storages = itertools.count()


def bytes_per_token(config: ModelConfig, bytes_each: int = 2) -> int:
    """Bytes that the cache of one row takes for each token."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_each


class KVCache:
    """The cache of one batch.

    windows: for each layer the positions that it looks back on, itself included, or None for all;
    such a layer keeps no more than that. padding: for each row the number of its first positions that are
    padding. capacity: positions to make room for at first; it grows when there are more.

    >>> cache = KVCache(config.windows, capacity=384)
    >>> logits = model(ids, positions=cache.positions(ids), cache=cache)  # [B, 1, V]
    >>> cache.advance(ids.shape[1])
    """

    def __init__(self, windows: list[int | None], *, padding: list[int] | None = None, capacity: int = _BLOCK) -> None:
        self.windows = windows
        self.length = 0
        """Positions written so far, padding included."""
        self._given: tuple[tuple[int, int], Slots] | None = None  # the slots that were last asked for
        self.storage = next(_storages)
        """Another number for each storage of any cache: it changes when this one's keys and values move."""
        self._padding = torch.tensor(padding) if padding and any(padding) else None  # [B]
        self._capacity = capacity
        self._keys: list[Tensor | None] = [None] * len(windows)  # [B, K, capacity or window, D]
        self._values: list[Tensor | None] = [None] * len(windows)
        self._masks: dict[tuple[int | None, int], Tensor | None] = {}  # of this forward pass

    @property
    def nbytes(self) -> int:
        """Bytes that it takes now."""
        return sum(x.nbytes for x in (*self._keys, *self._values) if x is not None)

    def positions(self, ids: Tensor) -> Tensor:
        """Positions [B or 1, T] of the new tokens ``ids`` [B, T], counted from each row's first real one."""
        positions = torch.arange(self.length, self.length + ids.shape[1], device=ids.device)[None]
        return positions if self._padding is None else (positions - self.padding(ids)[:, None]).clamp(min=0)

    def padding(self, ids: Tensor) -> Tensor:
        """How many of the first positions of each row of ``ids`` are padding, [B]."""
        if self._padding is None:
            return torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        self._padding = self._padding.to(ids.device)
        return self._padding

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add k, v [B, K, T, D] of ``layer``. All its queries may see, [B, K, S, D], and which of it they do.

        The mask is [B or 1, 1, T, S], or None where it would be causal, or all true for T = 1. Queries that are
        padding see themselves, as a softmax over nothing is no number.
        """
        t, window = k.shape[2], self.windows[layer]
        if self._keys[layer] is None:
            room = max(self._capacity, t)
            self._keys[layer], self._values[layer] = self._room(layer, k, room), self._room(layer, v, room)
        keys, values = self._keys[layer], self._values[layer]
        assert keys is not None
        assert values is not None
        if window is not None:
            keys, values = self._update_window(window, keys, values, k, v)
        else:
            stop = self.length + t
            if stop > keys.shape[2]:
                keys, values = self._grown(layer, keys, stop), self._grown(layer, values, stop)
                self._keys[layer], self._values[layer] = keys, values
            keys[:, :, self.length : stop] = k
            values[:, :, self.length : stop] = v
            keys, values = keys[:, :, :stop], values[:, :, :stop]
        return keys, values, self._mask(window, t, keys.shape[2], k.device)

    def slots(self, step: int = _SLOTS) -> Slots:
        """Of each layer the storage of keys and values [B, K, S, D], with room for one more position, to write there.

        S is a multiple of ``step`` above the positions so far, or the window if that is less. Position i is in slot
        i % S. All of a storage is never given: that would be contiguous, for which a compiler makes another graph.
        """
        above = (self.length // step + 1) * step
        if self._given is not None and self._given[0] == (self.storage, above):
            return self._given[1]
        found = []
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            assert keys is not None
            assert values is not None
            s = min(above, self.windows[layer] or above)
            if s >= keys.shape[2]:
                keys, values = self._grown(layer, keys, s), self._grown(layer, values, s)
                self._keys[layer], self._values[layer] = keys, values
            found.append((keys[:, :, :s], values[:, :, :s]))
        self._given = (self.storage, above), found
        return found

    def advance(self, t: int) -> None:
        """Count the ``t`` positions that a forward pass has added in all layers."""
        self.length += t
        self._masks.clear()

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        if self._padding is not None:
            self._padding = self._padding[rows]
        index = torch.tensor(rows)
        for stored in (self._keys, self._values):
            for layer, x in enumerate(stored):
                stored[layer] = None if x is None else x[index.to(x.device)]
        self._masks.clear()
        self._moved()

    def truncate(self, length: int) -> int:
        """Forget the positions from ``length`` on; returns how many are left.

        A window that has moved on has lost what the earlier positions would look back on: then all is forgotten.
        """
        self._masks.clear()  # those of a forward pass that was interrupted
        windows = [w for w in self.windows if w is not None]
        if length < self.length:
            self.length = 0 if windows and self.length > min(windows) else length
        return self.length

    # A layer without a window is stored in order. One with a window of W is a ring: position i at i % W. Keys are
    # rotated before they come here, so that attention does not mind their order.

    def _moved(self) -> None:
        """Note that keys and values are elsewhere, and let go of where they were."""
        self.storage = next(_storages)
        self._given = None

    def _room(self, layer: int, x: Tensor, positions: int) -> Tensor:
        """New storage for ``positions`` of ``layer``, of the kind of ``x``."""
        self._moved()
        return x.new_zeros(x.shape[0], x.shape[1], self.windows[layer] or positions, x.shape[3])

    def _grown(self, layer: int, x: Tensor, positions: int) -> Tensor:
        """Storage with what is in ``x``, for more than ``positions``: half as much again, so that copies are rare. A
        ring has one slot more, which it does not use."""
        if self.windows[layer] is not None:
            self._moved()
            return F.pad(x, (0, 0, 0, 1))
        room = self._room(layer, x, -(-3 * positions // (2 * _BLOCK)) * _BLOCK)
        room[:, :, : self.length] = x[:, :, : self.length]
        return room

    def _update_window(self, window: int, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write into the ring; returns what the new queries may see: for one, the ring, else the ring and the new."""
        t, device = k.shape[2], k.device
        old = torch.arange(max(0, self.length - window + 1), self.length, device=device) % window
        seen_k, seen_v = k, v
        if t > 1 and self.length:
            seen_k = torch.cat((keys[:, :, old], k), dim=2)
            seen_v = torch.cat((values[:, :, old], v), dim=2)
        kept = min(t, window)
        slots = torch.arange(self.length + t - kept, self.length + t, device=device) % window
        keys[:, :, slots] = k[:, :, t - kept :]
        values[:, :, slots] = v[:, :, t - kept :]
        if t > 1 or not self.length:
            return seen_k, seen_v
        filled = min(self.length + 1, window)
        return keys[:, :, :filled], values[:, :, :filled]

    def _mask(self, window: int | None, t: int, s: int, device: torch.device) -> Tensor | None:
        if (window, t) not in self._masks:
            self._masks[window, t] = self._make_mask(window, t, s, device)
        return self._masks[window, t]

    def _make_mask(self, window: int | None, t: int, s: int, device: torch.device) -> Tensor | None:
        if self._padding is None and (t == 1 or (self.length == 0 and (window is None or window >= t))):
            return None
        stop = self.length + t
        queries = torch.arange(self.length, stop, device=device)[:, None]  # [T, 1]
        keys = torch.arange(stop - s, stop, device=device)  # [S]
        if window is not None and t == 1:
            # In the ring, slot j has the newest position that is j modulo the window.
            keys = stop - 1 - (stop - 1 - torch.arange(s, device=device)) % window
        mask = keys <= queries
        if window is not None:
            mask &= keys > queries - window
        if self._padding is None:
            return mask[None, None]
        real = keys >= self._padding.to(device)[:, None]  # [B, S]
        return ((mask & real[:, None]) | (keys == queries))[:, None]
