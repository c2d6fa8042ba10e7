"""A compiled step computes what the model computes, with the same cache."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from test_cache import BASE, WINDOW, assert_close, random_model, tokens
from tiny_hf import hf_model, write_tokenizer

from torchtitan_style import load_model
from torchtitan_style.common.errors import UserError
from torchtitan_style.inference.cache import KVCache
from torchtitan_style.inference.decode import Decoder
from torchtitan_style.inference.sampling import Sampler
from torchtitan_style.inference.settings import Sampling
from torchtitan_style.inference.step import DecodingStep
from torchtitan_style.models.qwen3.inference import fuse
from torchtitan_style.models.qwen3.model import Qwen3ForCausalLM

CPU = torch.device("cpu")
# One layer that sees everything and one with a window, which the text leaves behind.
CONFIG = dataclasses.replace(
    BASE, num_hidden_layers=2, attention_bias=True, **WINDOW, sliding_window=5, max_window_layers=1
)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    model = random_model(CONFIG)
    fuse(model, compile=True)
    return model


@pytest.fixture(scope="module")
def step(model: Qwen3ForCausalLM) -> DecodingStep:
    step = DecodingStep(model, CONFIG, CPU, compile=True)
    step.prepare(1)
    step.prepare(2)
    return step


@pytest.mark.parametrize(
    ("rows", "prompt", "capacity"),
    [(1, 1, 256), (1, 3, 32), (1, 20, 300), (1, 250, 256), (1, 250, 1024), (2, 3, 32), (3, 60, 256), (5, 250, 256)],
    ids=[
        "from the first token",
        "small",
        "window left behind",
        "growing",
        "from block to block",
        "rows",
        "rows, from block to block",
        "rows, growing",
    ],
)
def test_every_step_has_the_logits_of_the_model_and_nothing_is_compiled_again(
    model: Qwen3ForCausalLM, step: DecodingStep, rows: int, prompt: int, capacity: int
) -> None:
    ids = tokens(rows, prompt + 12)
    whole = random_model(CONFIG)
    cache = KVCache(model.config.windows, capacity=capacity)
    with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile"):
        expected = whole(ids)
        model(ids[:, :prompt], positions=cache.positions(ids[:, :prompt]), cache=cache)
        cache.advance(prompt)
        for i in range(prompt, prompt + 12):
            assert_close(step(ids[:, i : i + 1], cache=cache)[:, 0], expected[:, i])
            cache.advance(1)
        # And the model goes on from what the step has left in the cache.
        more = tokens(rows, 3, seed=1)
        found = model(more, positions=cache.positions(more), cache=cache)[:, 0]
        assert_close(found, whole(torch.cat((ids, more), dim=1))[:, -1])


def drawn(model: Qwen3ForCausalLM, prompts: list[list[int]], step: DecodingStep | None, temperature: float) -> list:
    sampler = Sampler(Sampling(temperature=temperature), seeds=range(len(prompts)))
    longest = max(map(len, prompts))
    cache = KVCache(model.config.windows, padding=[longest - len(prompt) for prompt in prompts])
    decoder, found = Decoder(model, prompts, sampler, cache=cache, device=CPU, step=step), []
    for new, _ in zip(decoder, range(12), strict=False):
        found.append(dict(zip(decoder.rows, new, strict=True)))
        if len(found) == 6:
            decoder.keep(decoder.rows[:2])
        if len(found) == 9:
            decoder.keep(decoder.rows[:1])
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    "prompts",
    [[[5, 6, 7]], [[9], [1, 2, 3, 4, 5, 6, 7, 8], [4, 4]]],
    ids=["a row", "padded rows, a padded one left"],
)
def test_the_tokens_are_the_same(
    model: Qwen3ForCausalLM, step: DecodingStep, prompts: list[list[int]], temperature: float
) -> None:
    with torch.compiler.set_stance("fail_on_recompile"):
        assert drawn(model, prompts, step, temperature) == drawn(model, prompts, None, temperature)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler, which there is not in a suite that a script has started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    sys.setprofile(None)
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_a_guard_is_not_lost(model: Qwen3ForCausalLM, step: DecodingStep) -> None:
    def interrupt(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename == torch._dynamo.guards.__file__:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    ids, cache = tokens(1, 4), KVCache(model.config.windows)
    with torch.inference_mode():
        model(ids[:, :3], positions=cache.positions(ids[:, :3]), cache=cache)
        cache.advance(3)
        sys.setprofile(interrupt)
        with pytest.raises(KeyboardInterrupt):
            step(ids[:, 3:], cache=cache)


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_model().save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="--compile: there is no C\\+\\+ compiler"):
        load_model(tmp_path, compile=True)
