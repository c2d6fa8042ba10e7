"""Documents packed into one row are as if each were alone: loss, every gradient, positions, windows."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask

from torchtitan_style.data.rows import Rows
from torchtitan_style.models.qwen3.attention import attend, attention_mask, document_positions
from torchtitan_style.models.qwen3.config import Qwen3Config
from torchtitan_style.models.qwen3.model import Qwen3ForCausalLM

LENGTHS = [[5, 1, 9, 17], [20, 12], [32]]


def documents() -> torch.Tensor:
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS]
    return torch.stack(rows)


@pytest.fixture(params=[None, 4], ids=["full", "window"])
def model(request: pytest.FixtureRequest) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    window = {} if request.param is None else {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        **window,
    )
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # so that attention is not nearly uniform
    return model


def test_documents_packed_together_are_as_each_alone(model: Qwen3ForCausalLM) -> None:
    inputs, labels = torch.randint(0, 97, (2, 3, 32))
    labels[torch.rand(labels.shape) < 0.2] = -100
    loss, right = model(inputs, labels, documents())
    loss.backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone, alone_right = torch.zeros(()), 0
    for row, lengths in enumerate(LENGTHS):
        for ids, wanted in zip(inputs[row].split(lengths), labels[row].split(lengths), strict=True):
            part, hits = model(ids[None], wanted[None])
            part.backward()
            alone, alone_right = alone + part.detach(), alone_right + hits
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
    assert right == alone_right
    for name, parameter in model.named_parameters():
        error = (packed[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, f"{name}: {error}"


def test_blocks_are_compiled_where_all_else_runs_uncompiled() -> None:
    """As in evaluation. Uncompiled, FlexAttention warns, and holds all scores."""
    torch.manual_seed(0)
    numbers = (torch.rand(2, 300) < 0.05).cumsum(dim=1)
    mask = attention_mask(numbers, 300, None, flex=True, device=torch.device("cpu"))
    booleans = attention_mask(numbers, 300, None, flex=False, device=torch.device("cpu"))
    q, k, v = torch.randn(2, 4, 300, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = attend(q, k, v, mask)
    torch.testing.assert_close(found, attend(q, k, v, booleans), rtol=1e-5, atol=1e-5)


def test_without_documents_a_row_is_one(model: Qwen3ForCausalLM) -> None:
    inputs = torch.randint(0, 97, (2, 32))
    one = model(inputs, None, torch.full((2, 32), 7))
    torch.testing.assert_close(model(inputs), one, rtol=1e-5, atol=1e-5)
    parted = model(inputs, None, (torch.arange(32) >= 16).long().expand(2, 32))
    torch.testing.assert_close(parted[:, :16], one[:, :16], rtol=1e-5, atol=1e-5)
    assert (parted[:, 17:] - one[:, 17:]).abs().max() > 1e-2


def test_positions_begin_anew_with_each_document() -> None:
    expected = [[position for length in row for position in range(length)] for row in LENGTHS]
    assert document_positions(documents()).tolist() == expected


@pytest.mark.parametrize("window", [None, 3])
def test_blocks_for_flex_attention_allow_what_the_mask_allows(window: int | None) -> None:
    torch.manual_seed(0)
    device = torch.device("cpu")
    ids = (torch.rand(2, 300) < 0.05).cumsum(dim=1)
    mask = attention_mask(ids, 300, window, flex=False, device=device)
    position = torch.arange(300)
    back = position[:, None] - position
    same = ids[:, :, None] == ids[:, None]
    allowed = same & (back >= 0) & (back < (window or 300))
    assert torch.equal(mask[:, 0], allowed)
    blocks = attention_mask(ids, 300, window, flex=True, device=device)
    assert torch.equal(create_mask(blocks.mask_mod, 2, 1, 300, 300, device="cpu")[:, 0], allowed)
    # Blocks of 128 × 128 that are left out: none of their positions is allowed.
    some = F.pad(allowed, (0, 84, 0, 84)).view(2, 3, 128, 3, 128).any(dim=(2, 4))
    assert torch.equal(blocks.to_dense()[:, 0].bool(), some)


def test_positions_of_rows_are_those_that_the_model_counts() -> None:
    draw = np.random.default_rng(0)
    documents = (draw.random((4, 50)) < 0.1).cumsum(axis=1)
    documents -= documents[:, :1]
    rows = Rows(documents, documents, documents)
    assert rows.positions.tolist() == document_positions(torch.from_numpy(documents)).tolist()
    assert rows.positions[:, 0].tolist() == [0] * 4
