"""Qwen3-MoE with a cache: what it computes without one, and no more of the experts than the chosen ones."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from torchtitan_style.inference.cache import KVCache
from torchtitan_style.models.qwen3_moe.config import FLAVORS
from torchtitan_style.models.qwen3_moe.model import Qwen3MoeForCausalLM


@torch.no_grad()
def test_with_a_cache_logits_are_the_same_and_one_token_reads_the_chosen_experts_only(monkeypatch) -> None:
    config = dataclasses.replace(FLAVORS["debug"], num_hidden_layers=3, mlp_only_layers=(1,))
    model = Qwen3MoeForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if "norm" in name else 0.15, generator=generator)
    ids = torch.randint(0, config.vocab_size, (1, 24), generator=generator)
    right = model(ids)
    cache = KVCache(config.windows, capacity=24)
    used: list[int] = []
    grouped_mm = F.grouped_mm

    def watched(rows: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        used.append(len(weight))
        return grouped_mm(rows, weight, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", watched)
    for start, stop in ((0, 20), (20, 21), (21, 22), (22, 23), (23, 24)):
        new = ids[:, start:stop]
        used.clear()
        logits = model(new, positions=cache.positions(new), cache=cache)[:, -1]
        cache.advance(new.shape[1])
        # fp32 sums in another order: 1e-7 each; logits are about 1.
        torch.testing.assert_close(logits, right[:, stop - 1], rtol=1e-5, atol=1e-5)
    assert used == []  # no grouped product over all experts for one token
