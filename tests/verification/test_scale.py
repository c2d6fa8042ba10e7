"""What ``verify --config`` makes small, and what it leaves as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchtitan_style.config import Config
from torchtitan_style.config.layout import Layout, plan_batch, plan_layout
from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.registry import model_config
from torchtitan_style.verification.layout import STEPS
from torchtitan_style.verification.scale import for_verification

CONFIGS = Path(__file__).parents[2] / "train_configs"
ROOM = {"memory": 2**60, "alone": 2**60, "flops": 1e30}
LITTLE = ROOM | {"memory": 2**20}


def scaled(name: str, *overrides: str, world_size: int, **room: float) -> tuple[Config, Config, Layout, str]:
    config = load_config(CONFIGS / name, overrides, world_size=world_size)
    layout = plan_layout(config.parallelism, world_size)
    small, notes = for_verification(config, layout, **(room or ROOM))  # type: ignore[arg-type]
    return config, small, layout, "\n".join(notes)


def test_a_model_that_fits_is_verified_whole() -> None:
    config, small, _, notes = scaled("qwen3.toml", world_size=2)
    assert model_config(small.model) == model_config(config.model)
    assert notes == ""
    assert small.training.seq_len == 256


@pytest.mark.parametrize(
    "room", [LITTLE, ROOM | {"alone": 2**30}, ROOM | {"flops": 1e9}], ids=["memory", "memory of one", "time"]
)
def test_one_that_does_not_is_verified_on_a_copy_with_the_same_heads(room: dict[str, float]) -> None:
    config, small, _, notes = scaled("qwen3_14b.toml", world_size=8, **room)
    whole, copy = model_config(config.model), model_config(small.model)
    assert copy.num_attention_heads == whole.num_attention_heads
    assert copy.num_key_value_heads == whole.num_key_value_heads
    assert copy.tie_word_embeddings == whole.tie_word_embeddings
    assert copy.num_parameters < 10e6
    assert "small copy" in notes
    assert f"{copy.num_hidden_layers} of 40 layers" in notes


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_what_does_not_divide_by_the_ranks_still_does_not(world_size: int) -> None:
    sizes = ["--model.hidden_size", "1030", "--model.intermediate_size", "3001", "--model.vocab_size", "151937"]
    batch = ["--training.local_batch_size", "1", "--data.num_streams", "-1", "--training.global_batch_size", "-1"]
    config, small, layout, _ = scaled("qwen3_0.6b_fineweb.toml", *sizes, *batch, world_size=world_size, **LITTLE)
    whole, copy = model_config(config.model), model_config(small.model)
    for name in ("hidden_size", "intermediate_size", "vocab_size"):
        assert getattr(copy, name) % layout.dp_shard == getattr(whole, name) % layout.dp_shard
        assert getattr(copy, name) < getattr(whole, name)


@pytest.mark.parametrize(("local", "total", "steps"), [("8", "64", 2), ("32", "64", 1), ("-1", "64", 1), ("1", "8", 2)])
def test_microbatches_stay_in_kind(local: str, total: str, steps: int) -> None:
    batch = ["--training.local_batch_size", local, "--data.num_streams", "-1", "--training.global_batch_size", total]
    _, small, layout, _ = scaled("qwen3.toml", *batch, world_size=2)
    plan = plan_batch(small.training, layout.dp)
    assert plan.accumulation_steps == steps
    assert plan.global_batch_size == plan.local_batch_size * layout.dp * steps <= 8


def test_dropout_is_taken_out_and_said() -> None:
    _, small, _, notes = scaled("qwen3.toml", "--model.dropout", "0.1", world_size=1)
    assert model_config(small.model).dropout == 0
    assert "without dropout" in notes


def test_a_sliding_window_slides_within_the_rows() -> None:
    window = ["--model.use_sliding_window", "true", "--model.max_window_layers", "2", "--model.sliding_window", "1024"]
    _, small, _, notes = scaled("qwen3.toml", *window, world_size=1)
    shape = model_config(small.model)
    assert shape.window(3) == 128
    assert "128" in notes
    _, small, _, _ = scaled("qwen3_14b.toml", *window, world_size=4, **LITTLE)
    shape = model_config(small.model)
    assert [shape.window(i) is not None for i in range(4)] == [False, False, True, True]


def test_every_nth_block_is_among_the_layers() -> None:
    option = ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "6"]
    _, small, _, _ = scaled("qwen3_14b.toml", *option, world_size=4, **LITTLE)
    assert model_config(small.model).num_hidden_layers == 6


def test_the_rate_rises_within_the_steps() -> None:
    _, small, _, _ = scaled("qwen3_14b.toml", world_size=4)
    assert small.lr_scheduler.warmup_steps <= 5


def test_a_run_shorter_than_what_is_compared_has_learning_rates_for_all_of_it() -> None:
    _, small, _, _ = scaled("qwen3.toml", "--training.steps", "3", "--lr_scheduler.warmup_steps", "1", world_size=1)
    assert small.training.steps == STEPS


def test_patterns_that_match_nothing_on_the_copy_are_left_out() -> None:
    alone = ["--parallelism.pipeline_parallel_degree", "1"]
    targets = [*alone, "--lora.rank", "4", "--lora.dropout", "0.1", "--lora.target_modules", "layers.30.*", "q_proj"]
    _, small, _, notes = scaled("qwen3_14b.toml", *targets, world_size=8, **LITTLE)
    assert small.lora.target_modules == ["q_proj"]
    assert (small.lora.rank, small.lora.dropout) == (4, 0)
    assert "without dropout" in notes
    assert "layers.30.*" in notes
    freeze = [*alone, "--training.freeze", "*layers.30.*", "*norm*"]
    _, small, _, _ = scaled("qwen3_14b.toml", *freeze, world_size=8, **LITTLE)
    assert small.training.freeze == ["*norm*"]
