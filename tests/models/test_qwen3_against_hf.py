"""Our Qwen3 against Transformers' Qwen3: the same weights in, the same logits, loss and gradients out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from torchtitan_style import Qwen3Config, Qwen3ForCausalLM
from torchtitan_style.models.qwen3.config import FLAVORS
from torchtitan_style.models.qwen3.hf import from_hf
from torchtitan_style.models.qwen3.rotary import rotary_cos_sin

SMALL = Qwen3Config(
    vocab_size=199,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    max_window_layers=3,
)
VARIANTS = {
    "grouped": {},
    "one key/value head": {"num_key_value_heads": 1},
    "as many key/value heads as query heads": {"num_key_value_heads": 4},
    "heads wider than the model": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32},
    "untied": {"tie_word_embeddings": False},
    "bias": {"attention_bias": True},
    "other theta and eps": {"rope_theta": 10_000.0, "rms_norm_eps": 1e-5},
    "window in all layers": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "window in the last layers": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "window of one": {"use_sliding_window": True, "sliding_window": 1, "max_window_layers": 1},
    "window switched off": {"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 0},
}


def pair(config: Qwen3Config) -> tuple[Qwen3ForCausalLM, torch.nn.Module]:
    """Ours and theirs, with the same random weights, none of them at a special value."""
    fields = dataclasses.asdict(config)
    del fields["dropout"]
    theta = fields.pop("rope_theta")
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **fields,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            attn_implementation="eager",
        )
    ).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if "norm" in name else 0.15, generator=generator)
    ours = Qwen3ForCausalLM(config)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=True)
    assert not missing
    assert not unexpected
    return ours, theirs


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 2, 17, 64])
def test_logits(variant: str, length: int) -> None:
    ours, theirs = pair(dataclasses.replace(SMALL, **VARIANTS[variant]))
    ids = torch.randint(0, SMALL.vocab_size, (3, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids)
    # fp32 through three layers of unit-scale activations; a wrong rotation or mask is off by 1e-1.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_every_gradient(variant: str) -> None:
    ours, theirs = pair(dataclasses.replace(SMALL, **VARIANTS[variant]))
    ids = torch.randint(0, SMALL.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids, labels=ids).loss
    expected.backward()
    loss, _ = ours(ids[:, :-1], ids[:, 1:])
    (loss / ids[:, 1:].numel()).backward()
    torch.testing.assert_close(loss / ids[:, 1:].numel(), expected, rtol=1e-6, atol=0)
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        theirs_grad = theirs_by_name[name].grad
        # A window of one position leaves q and k without a gradient, up to rounding.
        assert (parameter.grad - theirs_grad).norm() < 1e-5 * theirs_grad.norm() + 1e-6, name


@pytest.mark.parametrize("flavor", FLAVORS)
def test_parameter_count(flavor: str) -> None:
    config = FLAVORS[flavor]
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    assert config.num_parameters == sum(p.numel() for p in model.parameters())


def test_parameter_count_with_bias() -> None:
    config = dataclasses.replace(SMALL, attention_bias=True, tie_word_embeddings=False)
    assert config.num_parameters == sum(p.numel() for p in Qwen3ForCausalLM(config).parameters())


@pytest.mark.parametrize(
    ("flavor", "billions"), [("0.6B", 0.60), ("1.7B", 1.72), ("4B", 4.02), ("8B", 8.19), ("14B", 14.77), ("32B", 32.76)]
)
def test_published_sizes(flavor: str, billions: float) -> None:
    # Qwen3 Technical Report and model cards.
    assert FLAVORS[flavor].num_parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_flops_per_token() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = Qwen3ForCausalLM(SMALL)
    ids = torch.zeros(2, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids)[0].backward()
    # torch counts the matrix multiplications, but not its fused attention on CPU: added by the definition.
    attention = 12 * SMALL.num_attention_heads * SMALL.head_dim * 64 * SMALL.num_hidden_layers
    assert counter.get_total_flops() / ids.numel() + attention == SMALL.flops_per_token(64)
    windowed = dataclasses.replace(SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=2)
    assert SMALL.flops_per_token(64) - windowed.flops_per_token(64) == attention / 3 * (1 - 16 / 64)


@pytest.mark.parametrize("head_dim", [16, 128])
def test_rotary_angles_are_those_of_transformers_bit_for_bit(head_dim: int) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    rope = {"rope_theta": 1e6, "rope_type": "default"}
    theirs = Qwen3RotaryEmbedding(transformers.Qwen3Config(head_dim=head_dim, rope_parameters=rope))
    positions = torch.arange(40_960)[None]
    cos, sin = rotary_cos_sin(positions, head_dim=head_dim, theta=1e6)
    expected = theirs(torch.zeros(1), positions)
    assert torch.equal(cos, expected[0])
    assert torch.equal(sin, expected[1])


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32_768}


@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 1.5, "original_max_position_embeddings": 2048, "rope_theta": 1e4},
        {"beta_fast": 8, "beta_slow": 2.0, "attention_factor": 1.25},
        {"truncate": False, "factor": 2},
        {"mscale": 0.7, "mscale_all_dim": 1.3, "factor": 40.0},
        {"beta_fast": 1.01, "beta_slow": 1.0, "original_max_position_embeddings": 7},
    ],
    ids=["published", "small", "betas, attention factor", "not truncated", "mscale", "no ramp"],
)
def test_yarn_is_that_of_transformers_bit_for_bit(head_dim: int, changes: dict[str, float]) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    rope = YARN | changes
    theirs = Qwen3RotaryEmbedding(
        transformers.Qwen3Config(head_dim=head_dim, max_position_embeddings=131_072, rope_parameters=dict(rope))
    )
    ours = from_hf({"head_dim": head_dim, "max_position_embeddings": 131_072, "rope_parameters": rope})
    positions = torch.arange(131_072)[None, ::7]
    found = rotary_cos_sin(positions, head_dim=head_dim, theta=ours.rope_theta, yarn=ours.yarn)
    for mine, expected in zip(found, theirs(torch.zeros(1), positions), strict=True):
        assert torch.equal(mine, expected)


def test_labels_of_minus_100_do_not_count() -> None:
    model = Qwen3ForCausalLM(SMALL)
    ids = torch.randint(0, SMALL.vocab_size, (2, 16))
    labels = ids.clone()
    labels[:, 5:] = -100
    loss, right = model(ids, labels)
    short_loss, short_right = model(ids[:, :5], ids[:, :5])
    torch.testing.assert_close(loss, short_loss)
    assert right == short_right


def test_dropout_acts_in_training_only() -> None:
    model = Qwen3ForCausalLM(dataclasses.replace(SMALL, dropout=0.5, attention_dropout=0.5))
    ids = torch.arange(12)[None]
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_a_contradictory_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="num_attention_heads"):
        Qwen3Config(num_attention_heads=6, num_key_value_heads=4)
