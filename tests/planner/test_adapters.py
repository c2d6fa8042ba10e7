"""What LoRA needs in memory and computation: by closed formulas, and as torch counts it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import Layout
from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.lora import add_adapters
from torchtitan_style.models.qwen3.model import Qwen3ForCausalLM
from torchtitan_style.models.qwen3.spec import QWEN3
from torchtitan_style.models.registry import model_config
from torchtitan_style.models.trained import adapted_modules, flops_per_token
from torchtitan_style.planner.memory import checkpoint_bytes, plan_memory
from torchtitan_style.train.step import freeze

BATCH = ("--training.local_batch_size", "1", "--training.global_batch_size", "-1", "--optimizer.name", "adamw")


def test_an_8b_run_keeps_bf16_weights_and_state_for_adapters_alone() -> None:
    config = load_config(DEFAULT_CONFIG, ["--model.flavor", "8B", "--lora.rank", "16", *BATCH])
    # q and o: 4096 → 4096; k and v: 4096 → 1024; gate, up and down: 4096 and 12288. 36 layers.
    adapters = 36 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))
    weights = model_config(config.model).num_parameters
    state = plan_memory(config, Layout()).state
    assert state.weights == 2 * weights + 4 * adapters
    assert state.gradients == 4 * adapters
    assert state.optimizer == 8 * adapters + 4 * 2 * 7 * 36  # and how many steps each parameter has taken
    assert checkpoint_bytes(config) == 4 * adapters + state.optimizer
    full = plan_memory(load_config(DEFAULT_CONFIG, ["--model.flavor", "8B", *BATCH]), Layout())
    assert state.total < full.state.total / 7
    assert plan_memory(config, Layout()).total < full.total / 4


@pytest.mark.parametrize("options", [
    (),
    ("--lora.rank", "8"),
    ("--lora.rank", "8", "--lora.target_modules", "layers.1.*_proj"),
    ("--training.freeze", "*embed_tokens*"),
    ("--training.freeze", "*embed_tokens*", "model.layers.0.*"),
    ("--training.freeze", "*mlp*", "--model.tie_word_embeddings", "false"),
])  # fmt: skip
def test_operations_are_those_that_torch_counts(options: tuple[str, ...]) -> None:
    given = ["--model.flavor", "debug", "--training.seq_len", "64", *options]
    config = load_config(DEFAULT_CONFIG, given)
    shape = model_config(config.model)
    model: Any = Qwen3ForCausalLM(shape)
    freeze(model, config)
    add_adapters(model, config.lora, adapted_modules(QWEN3, shape, config.lora))
    ids = torch.randint(0, 512, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids)[0].backward()
    products = [count for operation, count in counter.get_flop_counts()["Global"].items() if "mm" in str(operation)]
    attention = 12 * shape.num_attention_heads * shape.head_dim * 64 * shape.num_hidden_layers
    planned = (flops_per_token(config) - attention) * ids.numel()
    # What q, k and v of the first layer with adapters are given needs no gradient, which is not counted.
    assert planned == pytest.approx(sum(products), rel=0.08 if config.lora.rank else 1e-12)
