"""A loaded model called as a module: logits of all positions, and the loss, as the plain model and Transformers have.

In fp32 the fused products add in another order: 1e-5 of the largest logit. In bf16 each of a few layers rounds to
8 bits, in another order than the plain model: 5% of the largest logit, against several times that for a wrong mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_hf import hf_model, write_tokenizer
from torch import Tensor

from torchtitan_style import Qwen3ForCausalLM, load_model
from torchtitan_style.checkpoint.saved import open_model
from torchtitan_style.checkpoint.weights import load_weights
from torchtitan_style.common.device import compiler_problem

VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "attention_bias": True},
    "sliding window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.05}
IDS = torch.arange(2 * 24).view(2, 24) * 37 % 300
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 15, [0] * 20 + [1] * 4])


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    hf_model(**VARIANTS[request.param]).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def plain_model(folder: Path, dtype: torch.dtype) -> Qwen3ForCausalLM:
    found = open_model(str(folder), verify=True)
    model = Qwen3ForCausalLM(found.config).to(dtype).eval()
    load_weights(found, dict(model.named_parameters()))
    return model.requires_grad_(False)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "documents"])
def test_logits_and_loss_are_those_of_the_plain_model(
    folder: Path, dtype: torch.dtype, documents: Tensor | None
) -> None:
    plain, model = plain_model(folder, dtype), load_model(folder, dtype=dtype, device="cpu").model
    labels = IDS.roll(-1, dims=1)
    labels[:, -1] = -100
    assert_close(model(IDS, documents=documents), plain(IDS, documents=documents), TOLERANCES[dtype])
    loss, right = model(IDS, labels, documents)
    expected_loss, expected_right = plain(IDS, labels, documents)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=TOLERANCES[dtype])
    assert abs(int(right) - int(expected_right)) <= (0 if dtype == torch.float32 else 4)
    assert_close(model(IDS[:, :1]), plain(IDS[:, :1]), TOLERANCES[dtype])


def test_logits_and_loss_are_those_of_transformers(folder: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = load_model(folder, dtype="float32", device="cpu").model
    with torch.no_grad():
        expected = theirs(IDS, labels=IDS)  # shifts the labels itself, and takes their mean
    assert_close(model(IDS), expected.logits, 1e-5)
    loss, _ = model(IDS[:, :-1], IDS[:, 1:])
    assert (loss / IDS[:, 1:].numel()).item() == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.skipif(compiler_problem(torch.device("cpu")) is not None, reason="needs a C++ compiler")
def test_a_model_loaded_to_be_compiled_can_be_called_too(folder: Path) -> None:
    # Nothing is compiled before text is generated: this is about the matrices that are kept for it.
    model = load_model(folder, dtype="float32", device="cpu", compile=True).model
    assert_close(model(IDS), plain_model(folder, torch.float32)(IDS), 1e-5)
    assert_close(model(IDS[:1, :1]), model(IDS)[:1, :1], 1e-5)
