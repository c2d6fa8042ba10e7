"""A step of decoding as a GPU runs it: recorded and replayed, and compiled a layer at a time. Here on a CPU, where a
stand-in for the recorded graph calls what was recorded, with the tensors of that time."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_cache import BASE, WINDOW, assert_close, random_model
from torch import Tensor

from tests.tracing import traced
from torchtitan_style.inference import step as step_module
from torchtitan_style.inference.cache import KVCache, Slots
from torchtitan_style.inference.decode import Decoder
from torchtitan_style.inference.sampling import Sampler
from torchtitan_style.inference.settings import Sampling
from torchtitan_style.inference.step import DecodingStep, Forward
from torchtitan_style.models.qwen3 import inference
from torchtitan_style.models.qwen3.inference import attend_by_sums, fuse
from torchtitan_style.models.qwen3.model import Qwen3ForCausalLM

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(BASE, num_hidden_layers=2)
WINDOWED = dataclasses.replace(CONFIG, **WINDOW, sliding_window=5, max_window_layers=1)


class Graph:
    """In place of a CUDA graph."""

    replayed = 0

    def __init__(self, replays: step_module._Replays, forward: Forward, slots: Slots) -> None:
        self.given, self.forward, self.slots = replays, forward, slots

    def replay(self) -> None:
        Graph.replayed += 1
        given = self.given
        logits = self.forward(given._ids, self.slots, given._length, given._padding)
        given._logits.copy_(logits)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    def record(self: step_module._Replays, forward: Forward, slots: Slots) -> None:
        self._graph = Graph(self, forward, slots)  # type: ignore[assignment]

    monkeypatch.setattr(step_module._Replays, "_record", record)
    Graph.replayed = 0
    return Graph


def decode(model: Qwen3ForCausalLM, step: DecodingStep, prompt: int, tokens: int, padding: list[int]) -> None:
    """Compare the step with the model, token by token; half-way the middle row of several is taken out."""
    config, rows = model.config, len(padding)
    caches = [KVCache(config.windows, padding=padding) for _ in range(2)]
    with torch.inference_mode():
        ids = torch.randint(0, config.vocab_size, (rows, prompt))
        for cache in caches:
            model(ids, positions=cache.positions(ids), cache=cache)
            cache.advance(prompt)
        for number in range(tokens):
            if number == tokens // 2 and rows > 2:
                rows -= 1
                for cache in caches:
                    cache.select([0, *range(2, rows + 1)])
            token = torch.randint(0, config.vocab_size, (rows, 1))
            want = model(token, positions=caches[0].positions(token), cache=caches[0])
            assert_close(step(token, cache=caches[1]), want)
            for cache in caches:
                cache.advance(1)


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["", "window"])
@pytest.mark.parametrize("padding", [[0], [0, 3, 1], [2, 0]], ids=["row", "three rows", "two rows"])
def test_replayed_steps_have_the_logits_of_the_model(graphs: type[Graph], config, padding: list[int]) -> None:
    model = random_model(config)
    fuse(model)
    step = DecodingStep(model, config, CPU, compile=False, replay=True)
    for prompt in (4, 250, 300):  # one grows past its slots, one past its storage; then another cache
        decode(model, step, prompt, 14, padding)
    # The first step of a cache, of other rows, and of more slots runs as it is.
    changes = 3 + 3 * (len(padding) > 2) + 1
    assert graphs.replayed == 3 * 14 - changes


def test_slots_grow_in_proportion(graphs: type[Graph]) -> None:
    """Long texts are not recorded anew each 256 tokens."""
    cache = KVCache([None])
    seen = set()
    with torch.inference_mode():
        cache.update(0, torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
        replays = step_module._Replays()

        def forward(ids: Tensor, slots: Slots, length: Tensor, padding: Tensor) -> Tensor:
            seen.add(slots[0][0].shape[2])
            return torch.zeros(1, 1, 8)

        for length in range(1, 32_768):
            cache.length = length
            replays(forward, torch.zeros(1, 1, dtype=torch.long), cache)
    assert len(seen) < 50
    assert {256, 512, 768} <= seen


def test_a_layer_is_compiled_once_for_one_row_and_once_for_several(monkeypatch) -> None:
    monkeypatch.setattr(inference, "_compiled_step", functools.cache(inference._compiled_step.__wrapped__))
    model = random_model(CONFIG)
    fuse(model, compile=True)
    step = DecodingStep(model, CONFIG, CPU, compile=False)

    class Compiled:
        """The model with its layers compiled, as they are on a GPU."""

        def __call__(self, *args, **named):
            for layer in model.model.layers:
                layer.compiles = True
            try:
                return model(*args, **named)
            finally:
                for layer in model.model.layers:
                    layer.compiles = False

    step._model = Compiled()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with traced("eager"):  # graphs are only counted
        for padding in ([0], [0, 3, 1], [2, 0], [1, 0, 4, 2]):
            decode(model, step, 60, 12, padding)  # from 64 slots to 128
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_as_sums(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(3, heads, t, 16).to(dtype) for heads, t in ((8, 1), (2, 50), (2, 50)))
    mask = torch.rand(3, 1, 1, 50) > 0.3
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True)
    got = attend_by_sums(q, k, v, mask)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double().view_as(want), want, rtol=0, atol=1e-6 if dtype == torch.float32 else 4e-3)


def test_what_is_said_to_be_in_the_cache_is_there_after_an_interrupt() -> None:
    """Ctrl-C while the model computes: the next answer goes on from the tokens that are in the cache."""
    model = random_model(CONFIG)
    calls = 0

    def interrupted(*args: Any, **named: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return model(*args, **named)

    cache = KVCache(CONFIG.windows)
    decoder = Decoder(interrupted, [[1, 2, 3]], Sampler(Sampling(temperature=0.0), seeds=[0]), cache=cache, device=CPU)
    drawn: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        drawn.extend(token for (token,) in decoder)
    assert decoder.fed == [1, 2, 3, *drawn[:2]]
    assert cache.length == 5
