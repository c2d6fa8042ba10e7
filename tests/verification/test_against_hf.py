"""``verify --hf`` passes what Transformers computes, and finds a model that computes something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_hf import hf_model

from torchtitan_style.common.errors import UserError
from torchtitan_style.models.hf_folder import HFFolder
from torchtitan_style.models.qwen3 import model as qwen3
from torchtitan_style.verification import against_hf
from torchtitan_style.verification.against_hf import compare_with_transformers
from torchtitan_style.verification.report import Check, Difference, gradient_check, print_checks

MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "bias": {"attention_bias": True},
    "padding token": {"pad_token_id": 0, "vocab_size": 24},
    "window": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    # Rows of 256 are compared: four times as long as it says the model was trained on.
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 8.0,
        }
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, HFFolder]:
    found = {}
    for name, options in MODELS.items():
        model = hf_model(intermediate_size=160, num_hidden_layers=3, **options)
        path = tmp_path_factory.mktemp(name)
        model.save_pretrained(path)
        found[name] = HFFolder(path)
    return found


def compare(folder: HFFolder, dtype: torch.dtype = torch.float32) -> dict[str, Check]:
    return {c.name: c for c in compare_with_transformers(folder, dtype=dtype, device=torch.device("cpu"))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_passes(folders, name: str, dtype: torch.dtype) -> None:
    checks = compare(folders[name], dtype)
    assert [check.name for check in checks.values() if not check.passed] == []
    assert checks["greedy text, token by token"].cases == 96
    assert checks["every gradient"].cases == checks["names of parameters"].cases


def plain_norm(real: Callable) -> Callable:
    return lambda self, x: F.rms_norm(x, x.shape[-1:], None, self.eps)


def other_groups(real: Callable) -> Callable:
    """Query heads meet key/value heads in turn instead of by groups."""

    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        repeats = q.shape[1] // k.shape[1]
        options["enable_gqa"] = False
        return real(q, k.repeat(1, repeats, 1, 1), v.repeat(1, repeats, 1, 1), **options)

    return attention


def interleaved(real: Callable) -> Callable:
    """Rotary pairs (x[2i], x[2i + 1]), the other of the two conventions."""

    def rotate(x: Any, cos: Any, sin: Any) -> Any:
        half = x.shape[-1] // 2
        pairs = x.unflatten(-1, (half, 2)).transpose(-1, -2).flatten(-2)
        return real(pairs, cos, sin).unflatten(-1, (2, half)).transpose(-1, -2).flatten(-2)

    return rotate


def swapped(real: Callable) -> Callable:
    return lambda self, x: self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x))


LOGITS, GRADIENTS = "logits over lengths, padding, seeds", "every gradient"

# (where, what to replace it with, given what is there, model, checks that must fail)
FAULTS: dict[str, tuple[object, str, Callable, str, set[str]]] = {
    "norm without weight": (qwen3.RMSNorm, "forward", plain_norm, "tied", {LOGITS, GRADIENTS}),
    "another grouping of heads": (qwen3.F, "scaled_dot_product_attention", other_groups, "tied", {LOGITS, GRADIENTS}),
    "another rotary convention": (qwen3, "apply_rotary", interleaved, "tied", {LOGITS, GRADIENTS}),
    "rotary base": (
        qwen3,
        "rotary_cos_sin",
        lambda real: lambda positions, head_dim, theta, yarn: real(positions, head_dim=head_dim, theta=1e4),
        "tied",
        {LOGITS, GRADIENTS},
    ),
    "window off by one": (
        qwen3.Qwen3Config,
        "window",
        lambda real: lambda self, layer: (real(self, layer) or 999) + 1,
        "window",
        {LOGITS, GRADIENTS},
    ),
    "gate and up swapped": (qwen3.MLP, "forward", swapped, "tied", {LOGITS, GRADIENTS}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_model_is_found(folders, monkeypatch, fault: str) -> None:
    where, name, replace, model, failing = FAULTS[fault]
    monkeypatch.setattr(where, name, replace(getattr(where, name)))
    checks = compare(folders[model])
    assert {name for name, check in checks.items() if not check.passed} >= failing


def test_a_lost_gradient_is_found_though_the_loss_is_right(folders, monkeypatch) -> None:
    real = qwen3.MLP.forward
    monkeypatch.setattr(qwen3.MLP, "forward", lambda self, x: real(self, x.detach()))
    failed = [check for check in compare(folders["untied"]).values() if not check.passed]
    assert [check.name for check in failed] == [GRADIENTS]
    assert any("embed_tokens" in fault for fault in failed[0].faults)
    assert not any("lm_head" in fault for fault in failed[0].faults)


def test_a_weight_that_was_loaded_wrongly_is_named(folders, monkeypatch) -> None:
    real = against_hf.load_weights

    def load(source: HFFolder, parameters: dict[str, torch.Tensor]) -> None:
        real(source, parameters)
        parameters["model.layers.1.self_attn.k_proj.weight"].data[3, 5] += 1e-3

    monkeypatch.setattr(against_hf, "load_weights", load)
    check = compare(folders["tied"])["their values, bit for bit"]
    assert not check.passed
    assert check.faults == ("model.layers.1.self_attn.k_proj.weight has other values",)


def test_not_a_number_is_no_agreement(capsys) -> None:
    nan = float("nan")
    assert not Check("loss", 1, nan, 1e-5).passed
    check = gradient_check("gradients", [Difference("a", 0.0, 1.0), Difference("b", nan, nan)], 1e-5)
    assert not check.passed
    assert "b: off by" in check.faults[0]
    assert not print_checks("", [check])
    assert "WRONG" in capsys.readouterr().out


def test_a_model_that_does_not_fit_is_refused(folders, monkeypatch) -> None:
    monkeypatch.setattr(against_hf, "available_memory", lambda device: 1000)
    with pytest.raises(UserError, match=r"two models and their gradients take .* --dtype bfloat16 takes half"):
        compare(folders["tied"])
