"""LoRA's adapters, in every layout, against PEFT's on one process in fp32: the loss, every gradient, and 20 steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_hf import hf_model

peft = pytest.importorskip("peft", reason="PEFT, which these tests compare with, is not installed")

STEPS, RANK, ALPHA, LR = 20, 4, 6.0, 3e-3
CONFIG = f"""
[job]
dump_folder = "{{folder}}/run"  # not where somebody has trained
[model]
hf_assets_path = "{{folder}}/model"
[data]
tokenizer = "none"
[lora]
rank = {RANK}
alpha = {ALPHA}
[training]
steps = {STEPS}
seq_len = 32
local_batch_size = 1
mixed_precision_param = "float32"
max_norm = inf
seed = 3
[optimizer]
lr = {LR}
weight_decay = 0.0
[lr_scheduler]
warmup_steps = 0
decay_ratio = 0.0
"""
LAYOUTS: dict[str, tuple[tuple[int, int, int], tuple[str, ...]]] = {
    "1 process": ((1, 1, 1), ("eager/none", "eager/op", "compiled/none")),
    "dp2": ((1, 2, 1), ("eager/none", "eager/full")),
    "tp2": ((1, 1, 2), ("eager/none", "eager/op", "compiled/op")),
    "dp2 × tp2": ((1, 2, 2), ("eager/none", "muon")),
    "dp_replicate2 × dp2": ((2, 2, 1), ("eager/none",)),
}
NIGHTLY = {
    ("tp2", "compiled/op"),
    ("1 process", "compiled/none"),
}  # each graph is compiled twice: with and without input gradients


def ours(name: str) -> str:
    """PEFT's name of a parameter as it is here."""
    return name.removeprefix("base_model.model.").replace(".default.", ".")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT computes: loss and gradients with adapters that are not zero, and the losses of some steps."""
    folder = tmp_path_factory.mktemp("peft")
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    hf_model(tie_word_embeddings=False, attention_bias=True).save_pretrained(folder / "model")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    model = peft.get_peft_model(hf_model(tie_word_embeddings=False, attention_bias=True), config)
    generator = torch.Generator().manual_seed(5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(0.0, 0.1, generator=generator)
    save_file({ours(name): p.detach().clone() for name, p in trained.items()}, folder / "adapters.safetensors")
    ids = torch.randint(1, 512, (4, 33), generator=generator)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    labels[torch.rand(labels.shape, generator=generator) < torch.linspace(0, 0.6, 4)[:, None]] = -100
    save_file({"inputs": inputs, "labels": labels}, folder / "rows.safetensors")

    optimizer = torch.optim.AdamW(trained.values(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        logits = model(inputs).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten())  # a mean over labels that are not -100
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradients = {ours(name): p.grad.clone() for name, p in trained.items()}
            save_file(gradients, folder / "gradients.safetensors")
        optimizer.step()
    (folder / "expected.json").write_text(json.dumps({"loss": losses[0], "losses": losses}))
    return folder


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, run_ranks: Callable[..., None], expected: Path, tmp_path_factory: Any
) -> Callable[[str, str], dict[str, Any]]:
    """Of a layout and a combination; one start of processes per layout, for all that are asked for."""
    cache: dict[str, dict[str, Any]] = {}
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]

    def get(layout: str, combination: str) -> dict[str, Any]:
        if layout not in cache:
            degrees, _ = LAYOUTS[layout]
            chosen = [item.callspec.params["combination"] for item in items
                      if item.callspec.params.get("layout") == layout]  # fmt: skip
            output = tmp_path_factory.mktemp("found") / "found.json"
            script = Path(__file__).parent / "adapters_of_layouts.py"
            world_size = degrees[0] * degrees[1] * degrees[2]
            run_ranks(script, world_size, *degrees, expected, output, *dict.fromkeys(chosen))
            cache[layout] = json.loads(output.read_text())
        return cache[layout][combination]

    return get


CASES = [
    pytest.param(layout, combination, marks=[pytest.mark.nightly] if (layout, combination) in NIGHTLY else [])
    for layout, (_, combinations) in LAYOUTS.items()
    for combination in combinations
]


@pytest.mark.parametrize(("layout", "combination"), CASES)
def test_adapters_are_trained_as_pefts(found, expected: Path, layout: str, combination: str) -> None:
    result = found(layout, combination)
    assert result["starts as the base"]
    assert result["loss"] < 1e-6
    # Sums of fp32 terms in another order: 1e-7 each. A term that is dropped or doubled is above 1e-2.
    wrong = {name: difference for name, difference in result["gradients"].items() if not difference < 1e-5}
    assert not wrong
    assert len(result["gradients"]) == 2 * 7 * 2  # two factors of seven layers in two blocks
    if combination != "muon":
        losses = json.loads((expected / "expected.json").read_text())["losses"]
        assert losses[-1] < 0.9 * losses[0]
        assert result["losses"] == pytest.approx(losses, rel=1e-5)


def test_adapters_start_the_same_on_every_layout(found) -> None:
    starts = [found(layout, "eager/none")["initial"] for layout in LAYOUTS]
    assert all(start == starts[0] for start in starts)  # squares of the same numbers, added up in the same order
    for name, squares in starts[0].items():
        inputs = 96 if "down_proj" in name else 128 if "o_proj" in name else 64
        if name.endswith("lora_B.weight"):
            assert squares == 0
        else:  # as many numbers of a variance of a third of 1 / inputs, within four standard deviations
            assert squares == pytest.approx(RANK / 3, rel=4 * (2 / (RANK * inputs)) ** 0.5)
