"""Initial weights: by seed and name alone. (That layouts agree bit for bit: test_gradients.py.)"""

from __future__ import annotations

import dataclasses

import torch

from torchtitan_style import Qwen3ForCausalLM
from torchtitan_style.distributed import init
from torchtitan_style.models.qwen3.config import FLAVORS

CONFIG = dataclasses.replace(FLAVORS["debug"], tie_word_embeddings=False, attention_bias=True)


def weights(config=CONFIG, *, seed: int = 0) -> dict[str, torch.Tensor]:
    model = Qwen3ForCausalLM(config)
    init.init_weights(model, seed=seed, initial_std=model.initial_std)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before() -> None:
    first = weights()
    torch.rand(100)
    second = weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_and_another_name_give_other_weights() -> None:
    first, second = weights(), weights(seed=1)
    for name, value in first.items():
        if "norm" not in name and "bias" not in name:
            assert not torch.equal(value, second[name]), name
    layers = [first[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1)]
    assert not torch.equal(*layers)


def test_a_parameter_does_not_depend_on_the_rest_of_the_model() -> None:
    deeper = weights(dataclasses.replace(CONFIG, num_hidden_layers=3))
    for name, value in weights().items():
        if not name.endswith(("o_proj.weight", "down_proj.weight")):  # their width depends on the depth
            assert torch.equal(value, deeper[name]), name


def test_widths_are_those_of_the_table() -> None:
    for name, value in weights().items():
        if "norm" in name:
            assert (value == 1).all()
        elif name.endswith("bias"):
            assert (value == 0).all()
        else:
            expected = 0.02 / 2 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02  # √(2 · 2 layers)
            # The standard error of a standard deviation over n draws is σ / √(2n): six of them.
            assert abs(value.std() - expected) < 6 * expected / (2 * value.numel()) ** 0.5, name
            assert abs(value.mean()) < 6 * expected / value.numel() ** 0.5, name


def test_tiles_do_not_show(monkeypatch) -> None:
    # Every tile has draws of its own: no row is repeated.
    monkeypatch.setattr(init, "_TILE", 64 * 16)
    embedding = weights()["model.embed_tokens.weight"]
    assert len(torch.unique(embedding, dim=0)) == len(embedding)
