"""Qwen3-MoE from Transformers' folders to checkpoints and back: each expert's tensors on disk, stacked in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from torchtitan_style.checkpoint.hf_export import export_hf
from torchtitan_style.checkpoint.hf_import import import_hf
from torchtitan_style.checkpoint.saved import SavedModel, open_model
from torchtitan_style.common.errors import UserError
from torchtitan_style.models.hf_folder import HFFolder
from torchtitan_style.models.qwen3_moe.hf import to_hf
from torchtitan_style.verification.against_hf import compare_with_transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model as Transformers saves it, in bf16, the second of three layers dense."""
    from torchtitan_style.models.qwen3_moe.config import Qwen3MoeConfig

    config = Qwen3MoeConfig(
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
        mlp_only_layers=(1,),
        router_aux_loss_coef=0.01,
    )
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**to_hf(config)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if "norm" in name else 0.15, generator=generator)
    path = tmp_path_factory.mktemp("hf") / "tiny"
    model.bfloat16().save_pretrained(path)
    return path


def test_a_round_trip_is_bitwise(folder: Path, tmp_path: Path) -> None:
    import_hf(HFFolder(folder), tmp_path / "imported")
    saved = open_model(str(tmp_path / "imported"), verify=True)
    assert isinstance(saved, SavedModel)
    assert saved.config == HFFolder(folder).config
    export_hf(saved, tmp_path / "exported", max_shard_size=60_000)
    before = load_file(folder / "model.safetensors")
    after: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "exported").glob("*.safetensors")):
        after |= load_file(file)
    assert before.keys() == after.keys()
    assert "model.layers.0.mlp.experts.5.gate_proj.weight" in after
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    settings = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert settings["model_type"] == "qwen3_moe"
    ids = torch.arange(40)[None]
    with torch.no_grad():
        models = [transformers.AutoModelForCausalLM.from_pretrained(f) for f in (folder, tmp_path / "exported")]
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_it_agrees_with_transformers(folder: Path) -> None:
    checks = compare_with_transformers(HFFolder(folder), dtype=torch.float32, device=torch.device("cpu"))
    assert [check.name for check in checks if not check.passed] == []
    names = {check.name for check in checks}
    assert {"router logits", "chosen experts", "auxiliary loss"} <= names


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate.weight", "model.layers.2.mlp.experts.3.up_proj.weight"])
def test_a_missing_tensor_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=f"1 of .* tensors are missing: {name}"):
        HFFolder(tmp_path).check()
