"""Qwen3-MoE with a cache: what it computes without one, and no more of the experts than the chosen ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny_hf import DIMENSIONS, write_tokenizer

from torchtitan_style import load_model
from torchtitan_style.__main__ import main
from torchtitan_style.inference.cache import KVCache
from torchtitan_style.models.qwen3_moe import experts
from torchtitan_style.models.qwen3_moe.config import FLAVORS
from torchtitan_style.models.qwen3_moe.inference import split_problem
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
    grouped_linear = experts.grouped_linear

    def watched(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        used.append(len(weight))
        return grouped_linear(rows, weight, ends)

    monkeypatch.setattr(experts, "grouped_linear", watched)
    for start, stop in ((0, 20), (20, 21), (21, 22), (22, 23), (23, 24)):
        new = ids[:, start:stop]
        used.clear()
        logits = model(new, positions=cache.positions(new), cache=cache)[:, -1]
        cache.advance(new.shape[1])
        assert bool(used) == (start == 0)  # no grouped product over all experts for one token
        # fp32 sums in another order: 1e-7 each; logits are about 1.
        torch.testing.assert_close(logits, right[:, stop - 1], rtol=1e-5, atol=1e-5)


SHARED = {"attention_bias": True, "mlp_only_layers": [1], "num_experts": 8, "num_experts_per_tok": 3,
          "moe_intermediate_size": 32, "num_hidden_layers": 3}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model as Transformers saves it, the second of three layers dense, no weight at a special value."""
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**DIMENSIONS | SHARED)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if "norm" in name else 0.15, generator=generator)
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def test_two_ranks_share_the_experts(run_ranks, folder: Path, tmp_path: Path) -> None:
    prompts, ids = ["def loss(x)", "naïve 学习"], list(range(40, 70))
    model = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        right = model.model(torch.tensor([ids]))[0]
    (tmp_path / "given").write_text(json.dumps([prompts, ids]), encoding="utf-8")
    script = Path(__file__).with_name("experts_on_ranks.py")
    run_ranks(script, 2, folder, tmp_path / "given", tmp_path / "found", timeout=200)
    found = json.loads((tmp_path / "found").read_text(encoding="utf-8"))
    assert found["texts"] == model.generate(prompts, temperature=0.0, max_new_tokens=16)
    # fp32 sums in another order: 1e-7 each; logits are about 1.
    torch.testing.assert_close(torch.tensor(found["logits"]), right[-2:], rtol=1e-5, atol=1e-5)
    # For one token the ranks together have read the chosen experts of two layers, and no others.
    assert (found["chosen"], found["grouped"]) == (2 * 3, [])


def test_two_ranks_evaluate_as_one_process(run_ranks, folder: Path, tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def loss(x): return the gradient of naïve 学习, don't; " * 20, encoding="utf-8")
    given = ["--checkpoint", folder, "--dtype", "float32", "--data", text, "--json", "--seq-len", 64]
    main(["eval", *map(str, given)])
    right = json.loads(capsys.readouterr().out)["total"]
    script = Path(__file__).parents[1] / "evaluation/eval_on_ranks.py"
    run_ranks(script, 2, tmp_path / "found", "eval", *given, "--tensor-parallel", 2, timeout=200)
    found = json.loads((tmp_path / "found").read_text(encoding="utf-8"))["total"]
    assert found["tokens"] == right["tokens"]
    assert found["loss"] == pytest.approx(right["loss"], rel=1e-6)


def test_ranks_that_cannot_share_the_experts_are_refused() -> None:
    config = dataclasses.replace(FLAVORS["debug"], num_experts=6)
    assert split_problem(config, 2) is None
    assert split_problem(config, 4) == "4 ranks cannot share the model's num_experts of 6 evenly"
