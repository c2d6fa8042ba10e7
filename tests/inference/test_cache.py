"""With a cache the model computes what it computes without one, whatever the pieces, the padding and the window."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from torchtitan_style import Qwen3Config, Qwen3ForCausalLM
from torchtitan_style.inference.cache import KVCache, bytes_per_token
from torchtitan_style.models.qwen3 import inference
from torchtitan_style.models.qwen3.config import FLAVORS
from torchtitan_style.models.qwen3.inference import fuse

BASE = Qwen3Config(
    vocab_size=199,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
WINDOW = {"use_sliding_window": True}
VARIANTS = {
    "full": BASE,
    "bias": dataclasses.replace(BASE, attention_bias=True, tie_word_embeddings=False),
    "window in some layers": dataclasses.replace(BASE, **WINDOW, sliding_window=5, max_window_layers=1),
    "window of one": dataclasses.replace(BASE, **WINDOW, sliding_window=1, max_window_layers=0),
    "window that is never full": dataclasses.replace(BASE, **WINDOW, sliding_window=500, max_window_layers=0),
}
# fp32 sums in another order: 1e-7 each; logits are about 1.
TOLERANCE = 1e-5


@pytest.fixture(params=VARIANTS, scope="module")
def model(request: pytest.FixtureRequest) -> Qwen3ForCausalLM:
    return random_model(VARIANTS[request.param])


def random_model(config: Qwen3Config) -> Qwen3ForCausalLM:
    """Random weights, none of them at a special value."""
    model = Qwen3ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if "norm" in name else 0.15, generator=generator)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, BASE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def add(model: Qwen3ForCausalLM, cache: KVCache, ids: Tensor) -> Tensor:
    """Logits [B, V] after ``ids``, which are in the cache then."""
    logits = model(ids, positions=cache.positions(ids), cache=cache)
    cache.advance(ids.shape[1])
    return logits[:, 0]


@torch.no_grad()
def uncached(model: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    return model(ids)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    "pieces",
    [[1] * 40, [40], [7] + [1] * 33, [3, 4, 9, 1, 1, 6, 1, 1, 14], [4, 5, 6, 25]],
    ids=["one by one", "at once", "prompt and new tokens", "mixed", "growing"],
)
@pytest.mark.parametrize("capacity", [1, 64])
def test_every_step_has_the_logits_of_the_model_without_cache(
    model: Qwen3ForCausalLM, pieces: Sequence[int], capacity: int
) -> None:
    ids = tokens(2, sum(pieces))
    expected = uncached(model, ids)
    cache = KVCache(model.config.windows, capacity=capacity)
    for piece in pieces:
        start = cache.length
        assert_close(add(model, cache, ids[:, start : start + piece]), expected[:, start + piece - 1])


def test_padded_rows_have_the_logits_that_they_have_alone(model: Qwen3ForCausalLM) -> None:
    rows = [tokens(n, seed=n) for n in (3, 17, 1, 9, 17)]
    padding = [17 - len(row) for row in rows]
    cache = KVCache(model.config.windows, padding=padding)
    ids = torch.stack([torch.cat((tokens(pad, seed=99), row)) for pad, row in zip(padding, rows, strict=True)])
    for step in range(12):
        logits = add(model, cache, ids[:, :6]) if step == 0 else None
        logits = add(model, cache, ids[:, 6:] if step == 0 else ids)  # the prompts in two pieces
        for row, found in zip(rows, logits, strict=True):
            assert_close(found, uncached(model, row[None])[0, -1])
        new = logits.argmax(-1)
        rows = [torch.cat((row, token[None])) for row, token in zip(rows, new, strict=True)]
        ids = new[:, None]


def test_rows_are_selected_repeated_and_reordered(model: Qwen3ForCausalLM) -> None:
    ids = tokens(3, 12)
    cache = KVCache(model.config.windows)
    add(model, cache, ids)
    cache.select([2, 0, 2])
    new = tokens(3, 4, seed=1)
    expected = uncached(model, torch.cat((ids[[2, 0, 2]], new), dim=1))
    for i in range(4):
        assert_close(add(model, cache, new[:, i : i + 1]), expected[:, 12 + i])


def test_after_truncation_it_goes_on_as_if_the_rest_had_never_been(model: Qwen3ForCausalLM) -> None:
    ids = tokens(1, 20)
    cache = KVCache(model.config.windows)
    add(model, cache, ids)
    left = cache.truncate(11)
    narrow = any(window is not None and window < 20 for window in model.config.windows)
    assert left == (0 if narrow else 11)  # a window that has moved on has lost what is needed
    new = tokens(1, 9, seed=2)
    assert_close(add(model, cache, torch.cat((ids[:, left:11], new), dim=1)),
                 uncached(model, torch.cat((ids[:, :11], new), dim=1))[:, -1])  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
def test_the_fused_model_computes_the_same(
    model: Qwen3ForCausalLM, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices in fp32 are packed on CPUs without bf16; here either way on any."""
    monkeypatch.setattr(inference, "packs", lambda dtype, device: packed)
    fused = random_model(model.config)
    fuse(fused)
    ids = tokens(2, 20)
    expected = uncached(model, ids)
    cache = KVCache(model.config.windows)
    assert_close(add(fused, cache, ids[:, :8]), expected[:, 7])
    for i in range(8, 20):
        assert_close(add(fused, cache, ids[:, i : i + 1]), expected[:, i])


@pytest.mark.parametrize("rows", [1, 8])
def test_the_fused_model_in_bf16_is_as_near_to_fp32_as_the_model_in_bf16(rows: int) -> None:
    """The bound is the error of bf16 itself, with room for chance."""
    ids = tokens(rows, 20)
    right = uncached(random_model(BASE), ids)[:, -1]
    plain = uncached(random_model(BASE).bfloat16(), ids)[:, -1].float()
    fused = random_model(BASE).bfloat16()
    fuse(fused)
    found = add(fused, KVCache(fused.config.windows), ids).float()
    assert (found - right).norm() < 1.5 * (plain - right).norm()


def test_it_holds_key_value_heads_and_windows_and_no_more() -> None:
    config = VARIANTS["window in some layers"]
    cache = KVCache([config.window(layer) for layer in range(3)], capacity=32)
    add(random_model(config), cache, tokens(2, 20))
    numbers = 2 * (32 + 5 + 5) * config.num_key_value_heads * config.head_dim  # K and V, three layers
    assert cache.nbytes == 2 * numbers * 4


def test_bytes_of_a_token() -> None:
    # 28 layers, 8 of 16 heads of 128, keys and values, 2 bytes each: half of what 16 heads would take.
    assert bytes_per_token(FLAVORS["0.6B"]) == 114_688
    cache = KVCache([None] * 3, capacity=10)
    add(random_model(BASE), cache, tokens(1, 10))
    assert cache.nbytes == 10 * bytes_per_token(BASE, 4)
