"""From a checkpoint of adapters to a folder that PEFT loads: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import new_folder
from torchtitan_style.models.hf_folder import HFFolder, copy_assets
from torchtitan_style.models.trained import adaptable_modules, adapted_modules, adapter_shapes

from .base import Base
from .saved import SavedModel
from .weights import load_saved

PREFIX = "base_model.model."
"""Of PEFT's names: its model and the one that it wraps."""


def export_adapter(source: HFFolder | SavedModel, output: Path, *, dtype: torch.dtype | None = None) -> int:
    """Write the folder ``output``, which ``peft.PeftModel.from_pretrained`` loads. Returns the number of parameters.

    dtype: of the adapters; None: fp32, as they are stored. The weights that they belong to are not read.

    Raises UserError, with nothing left behind, if ``output`` is in use or ``source`` has no adapters.
    """
    if not isinstance(source, SavedModel) or not source.lora.rank:
        raise UserError(f"{source.path}: has no adapters (lora.rank was 0); leave out --adapter")
    adapted = adapted_modules(source.spec, source.config, source.lora)
    dense = [module for module in adapted if ".mlp." in module] if source.spec.expert_parallel else []
    if dense:  # its names are those that experts had before Transformers 5, and PEFT goes by names
        raise UserError(
            f"{source.path}: PEFT mistakes {dense[0]} for an expert; export the merged model, without --adapter"
        )
    shapes = adapter_shapes(source.spec, source.config, source.lora)
    adapters = {name: torch.empty(shape) for name, shape in shapes.items()}
    load_saved(source, adapters)
    with new_folder(output) as temporary:
        save_file(
            {PREFIX + name: tensor.to(dtype or tensor.dtype) for name, tensor in adapters.items()},
            temporary / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        (temporary / "adapter_model.safetensors").chmod(temporary.stat().st_mode & 0o666)
        settings = json.dumps(_settings(source), indent=2, sort_keys=True) + "\n"
        (temporary / "adapter_config.json").write_text(settings, encoding="utf-8")
        copy_assets(source.assets, temporary)
        temporary.rename(output)
    return sum(tensor.numel() for tensor in adapters.values())


def _settings(source: SavedModel) -> dict[str, Any]:
    """The fields of ``peft.LoraConfig`` that say what the adapters are."""
    lora, base = source.lora, Base.read(source.path)
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.source if base.on_hub else base.path,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "target_modules": _targets(source),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _targets(source: SavedModel) -> list[str]:
    """Names that PEFT compares with the end of a module's: short ones if they mean the same modules."""
    adapted = adapted_modules(source.spec, source.config, source.lora)
    kinds = sorted({module.rpartition(".")[2] for module in adapted})
    others = [module for module in adaptable_modules(source.spec, source.config) if module not in adapted]
    unambiguous = all(module.rpartition(".")[2] not in kinds for module in others)
    return kinds if unambiguous and not source.spec.expert_parallel else list(adapted)
