"""Layouts that train adapters, or some of the weights, as the command verifies them."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(("options", "lines"), [
    (("--lora.rank", 4, "--optimizer.name", "muon"), 2),
    (("--model.name", "qwen3_moe", "--lora.rank", 4, "--lora.target_modules", "q_proj", "o_proj",
      "--parallelism.expert_parallel_degree", 2, "--training.mixed_precision_param", "float32"), 1),
    (("--training.freeze", "*embed_tokens*", "model.layers.0.*", "--training.mixed_precision_param", "float32"), 1),
    (("--lora.rank", 4, "--optimizer.name", "muon", "--lora.target_modules", "layers.1.*",
      "--parallelism.pipeline_parallel_degree", 2, "--training.mixed_precision_param", "float32"), 1),
], ids=["adapters", "adapters beside experts", "frozen", "a pipeline, of whose stages one trains nothing"])  # fmt: skip
def test_a_layout_agrees_with_one_process(python, options, lines: int) -> None:
    degrees = ["--parallelism.tensor_parallel_degree", 2, "--world-size", 4]
    batch = ["--training.global_batch_size", 8, "--training.local_batch_size", 2, "--training.seq_len", 32]
    done = python("-m", "torchtitan_style", "verify", "--model.flavor", "debug", *batch, *degrees, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("every gradient of step 1") == lines  # in fp32, and in bf16
    assert "everything agrees" in done.stdout
