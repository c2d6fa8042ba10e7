"""A compiled step for windows that are wider than the slots that it is compiled with."""

from __future__ import annotations

import dataclasses

import torch
from test_cache import BASE, WINDOW, assert_close, random_model, tokens

from tests.tracing import traced
from torchtitan_style.inference.cache import KVCache
from torchtitan_style.inference.step import DecodingStep
from torchtitan_style.models.qwen3.inference import fuse

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(BASE, num_hidden_layers=2, **WINDOW, max_window_layers=1)


def test_a_wide_window_is_filled_and_left_behind_in_the_same_graph() -> None:
    torch.compiler.reset()  # what other tests compiled would have left sizes open
    config = dataclasses.replace(CONFIG, sliding_window=100)
    model, whole = random_model(config), random_model(config)
    with traced():
        fuse(model, compile=True)
        step = DecodingStep(model, config, CPU, compile=True)
        step.prepare(1)
    ids = tokens(1, 140)
    cache = KVCache(model.config.windows, capacity=256)
    with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile"):
        expected = whole(ids)
        model(ids[:, :60], positions=cache.positions(ids[:, :60]), cache=cache)
        cache.advance(60)
        for i in range(60, 140):
            assert_close(step(ids[:, i : i + 1], cache=cache)[:, 0], expected[:, i])
            cache.advance(1)
