"""Our Qwen3-MoE against Transformers': the same weights in, the same logits, routing, losses and gradients out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers

from torchtitan_style.models.hf_folder import disk_shapes
from torchtitan_style.models.qwen3_moe.config import FLAVORS, Qwen3MoeConfig
from torchtitan_style.models.qwen3_moe.experts import grouped_experts, loop_over_experts
from torchtitan_style.models.qwen3_moe.hf import from_hf, to_hf
from torchtitan_style.models.qwen3_moe.model import Qwen3MoeForCausalLM
from torchtitan_style.models.qwen3_moe.spec import QWEN3_MOE
from torchtitan_style.train.balance import balance_loss

SMALL = Qwen3MoeConfig(
    vocab_size=199,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    router_aux_loss_coef=0.3,  # so that its gradients are no small part of all
)
VARIANTS: dict[str, dict[str, Any]] = {
    "two of six": {},
    "weights not normalised": {"norm_topk_prob": False},
    "one of six": {"num_experts_per_tok": 1},
    "all of six": {"num_experts_per_tok": 6},
    "a single expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "five of seventeen": {"num_experts": 17, "num_experts_per_tok": 5},
    "a dense layer": {"mlp_only_layers": (1,)},
    "every second layer": {"decoder_sparse_step": 2},
    "tied": {"tie_word_embeddings": True},
    "window": {"use_sliding_window": True, "sliding_window": 5},
}


def pair(config: Qwen3MoeConfig) -> tuple[Qwen3MoeForCausalLM, Any]:
    """Ours and theirs, with the same random weights, none of them at a special value."""
    theirs = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**to_hf(config), attn_implementation="eager", experts_implementation="eager")
    ).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if "norm" in name else 0.15, generator=generator)
    ours = Qwen3MoeForCausalLM(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def compare(ours: Qwen3MoeForCausalLM, theirs: Any) -> None:
    """Routing, logits, losses and every gradient on random tokens."""
    config = ours.config
    ids = torch.randint(0, config.vocab_size, (3, 33), generator=torch.Generator().manual_seed(0))
    routed: list[tuple[torch.Tensor, ...]] = []
    gates = [module for name, module in ours.named_modules() if name.endswith("mlp.gate")]
    handles = [gate.register_forward_hook(lambda _m, _i, output: routed.append(output)) for gate in gates]
    with torch.no_grad():
        expected = theirs(ids, output_router_logits=True)
        # fp32 through three layers of unit-scale activations; a token with another expert is off by 1e-1.
        torch.testing.assert_close(ours(ids), expected.logits, rtol=1e-5, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert len(routed) == len(expected.router_logits) == config.num_sparse_layers
    for (logits, _, experts), right in zip(routed, expected.router_logits, strict=True):
        torch.testing.assert_close(logits, right, rtol=1e-5, atol=1e-5)
        best = right.softmax(-1, dtype=torch.float32).topk(config.num_experts_per_tok).indices
        assert torch.equal(experts.sort(-1).values, best.sort(-1).values)

    # Transformers shifts labels, and counts the routing of the last token, which has none: ours is given it, too.
    labels = torch.cat((ids[:, 1:], torch.full((3, 1), -100)), dim=1)
    right_loss = theirs(ids, labels=ids, output_router_logits=True)
    right_loss.loss.backward()
    loss = ours(ids, labels)[0] / (labels != -100).sum()
    counts = torch.stack([r.counts for r in ours.model.routing]).sum(0)
    probabilities = torch.stack([r.probabilities for r in ours.model.routing]).sum(0)
    aux_loss = balance_loss(counts, probabilities, ids.numel() * config.num_sparse_layers)
    torch.testing.assert_close(aux_loss, right_loss.aux_loss, rtol=1e-6, atol=0)
    total = loss + config.router_aux_loss_coef * aux_loss
    torch.testing.assert_close(total, right_loss.loss, rtol=1e-6, atol=0)
    total.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        # With one expert the router has no gradient at all, up to rounding.
        assert (parameter.grad - gradients[name]).norm() < 1e-5 * gradients[name].norm() + 1e-6, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_is_as_in_transformers(variant: str) -> None:
    compare(*pair(dataclasses.replace(SMALL, **VARIANTS[variant])))


def test_an_expert_without_tokens_and_one_with_all() -> None:
    ours, theirs = pair(SMALL)
    with torch.no_grad():
        for model in (ours, theirs):
            for layer in model.model.layers:
                layer.mlp.gate.weight.zero_()  # all are as likely, and the same two are taken for every token
    compare(ours, theirs)
    assert {0.0, 99.0} == set(ours.model.routing[0].counts.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 7, 0, 1], [11, 0, 0, 0, 0], [0, 0, 0, 0, 11], [0, 0, 0, 0, 0]])
def test_grouped_products_equal_the_loop(counts: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (sum(counts), 16), (5, 48, 16), (5, 16, 24)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    results = []
    for run in (grouped_experts, loop_over_experts):
        copies = [tensor.clone().requires_grad_() for tensor in inputs]
        output = run(copies[0], torch.tensor(counts), copies[1], copies[2])
        output.sum().backward()
        results.append([output, *(torch.zeros_like(c) if c.grad is None else c.grad for c in copies)])
    for grouped, loop in zip(*results, strict=True):
        # The same products of the same matrices; bf16 has 8 bits of mantissa.
        torch.testing.assert_close(grouped, loop, rtol=1e-6 if dtype == torch.float32 else 2e-2, atol=1e-5)


def test_recomputation_and_compilation_take_a_block_as_one_graph() -> None:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(FLAVORS["debug"])
    ids = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(ids, ids)[0]
        (loss + sum(routing.probabilities.square().sum() for routing in model.model.routing)).backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False, fullgraph=True, backend="aot_eager")
    for compiled, right in zip(gradients(), plain, strict=True):
        assert (compiled - right).norm() < 1e-5 * right.norm()


@pytest.mark.parametrize("flavor", FLAVORS)
def test_shapes_and_parameter_counts(flavor: str) -> None:
    config = FLAVORS[flavor]
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert QWEN3_MOE.parameter_shapes(config) == shapes
    assert config.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("flavor", "all", "active"), [("30B-A3B", 30.5, 3.3), ("235B-A22B", 235, 22)])
def test_published_sizes(flavor: str, all: float, active: float) -> None:
    # Qwen3 Technical Report, table 2, and model cards, rounded as there.
    config = FLAVORS[flavor]
    assert config.num_parameters / 1e9 == pytest.approx(all, abs=0.1)
    assert config.num_active_parameters / 1e9 == pytest.approx(active, abs=0.2)


def test_dimensions_are_those_of_transformers_where_it_has_the_published_ones() -> None:
    ours, theirs = to_hf(FLAVORS["30B-A3B"]), transformers.Qwen3MoeConfig().to_dict()
    common = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    experts = ("moe_intermediate_size", "num_experts_per_tok", "decoder_sparse_step", "router_aux_loss_coef")
    for name in (*common, *experts, "rms_norm_eps", "initializer_range", "tie_word_embeddings"):
        assert ours[name] == theirs[name], name
    assert ours["num_experts"] == transformers.Qwen3MoeConfig().num_experts


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_configuration_comes_back_from_config_json(variant: str) -> None:
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    assert from_hf(transformers.Qwen3MoeConfig(**to_hf(config)).to_dict()) == config


def test_flops_count_the_active_parameters() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = Qwen3MoeForCausalLM(SMALL)
    ids = torch.zeros(2, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids)[0].backward()
    # torch counts the matrix multiplications, but not its fused attention on CPU: added by the definition.
    attention = 12 * SMALL.num_attention_heads * SMALL.head_dim * 64 * SMALL.num_hidden_layers
    assert counter.get_total_flops() / ids.numel() + attention == SMALL.flops_per_token(64)


def test_tensors_on_disk_are_those_that_transformers_saves(tmp_path) -> None:
    from safetensors import safe_open

    config = dataclasses.replace(SMALL, mlp_only_layers=(1,))
    pair(config)[1].save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert disk_shapes(QWEN3_MOE, config) == saved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 4, "num_experts_per_tok": 5}, "cannot be routed to 5 experts where there are 4"),
        ({"mlp_only_layers": (3,)}, "the model has no layer 3"),
        ({"mlp_only_layers": (0, 1, 2)}, "no layer has experts"),
        ({"moe_intermediate_size": 20}, "multiple of 8"),
        ({"num_experts": 0}, "num_experts: must be at least 1"),
    ],
)
def test_an_impossible_shape_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
