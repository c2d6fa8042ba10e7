"""From a checkpoint to a model folder in Transformers' format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import new_folder
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer
from torchtitan_style.models.hf_folder import HFFolder, copy_assets, disk_shapes

from .saved import SavedModel
from .weights import load_weights, stored_dtypes


def export_hf(
    source: HFFolder | SavedModel,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the folder ``output``, which ``transformers.AutoModelForCausalLM.from_pretrained`` loads.

    dtype: type of the weights; None: as they are stored. max_shard_size: bytes of a file, unless one tensor is
    larger. The parameters of one file are held at a time. advance: called with the number of bytes of each file.

    Raises UserError, with nothing left behind, if ``output`` is in use or a weight does not fit ``dtype``.
    """
    spec, stored = source.spec, stored_dtypes(source)
    owners = {
        tensor.name: (name, tensor.part)
        for name, tensors in spec.disk_tensors(source.config).items()
        for tensor in tensors
    }
    tensors = {
        name: torch.empty(shape, dtype=dtype or stored[owners[name][0]], device="meta")
        for name, shape in disk_shapes(spec, source.config).items()
    }
    shapes = spec.parameter_shapes(source.config)
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    with new_folder(output) as temporary:
        for file, names in plan.filename_to_tensors.items():
            parameters = {
                owner: torch.empty(shapes[owner], dtype=dtype or stored[owner])
                for owner in dict.fromkeys(owners[name][0] for name in names)
            }
            load_weights(source, parameters)
            part = {}
            for name in names:
                owner, where = owners[name]
                part[name] = parameters[owner][where].clone() if where else parameters[owner]
            if dtype == torch.float16:
                _check_range(part)
            _save(part, temporary / file)
            advance(sum(tensor.nbytes for tensor in part.values()))
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (temporary / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        _write_settings(source, temporary, {tensor.dtype for tensor in tensors.values()})
        temporary.rename(output)


def _save(part: dict[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file, raising OSError if that fails."""
    try:
        save_file(part, file, metadata={"format": "pt"})
        file.chmod(file.parent.stat().st_mode & 0o666)  # as of any new file; safetensors lets nobody else read it
    except SafetensorError as error:
        raise OSError(f"{file.name}: {error}") from None


def _check_range(part: dict[str, torch.Tensor]) -> None:
    """fp16 ends at 65,504; what is larger would silently become infinite."""
    for name, tensor in part.items():
        if not tensor.isfinite().all():
            raise UserError(f"--dtype float16: {name} has values that do not fit; use bfloat16")


def _write_settings(source: HFFolder | SavedModel, folder: Path, dtypes: set[torch.dtype]) -> None:
    """config.json, generation_config.json, and the tokenizer's files."""
    import transformers

    ids: dict[str, int | None] = {}
    ends: list[int | None] = []
    copy_assets(source.assets, folder)
    if source.tokenizer is not None:
        tokenizer = Tokenizer(source.tokenizer)
        ends = list(dict.fromkeys((tokenizer.special_id("eos_token"), tokenizer.end_of_text)))
        ends = [i for i in ends if i is not None]
        ids = {"eos_token_id": ends[0], "pad_token_id": tokenizer.special_id("pad_token")}
    # No pad_token_id: Transformers would never train that token's embedding, and here it is end-of-text.
    spec = source.spec
    if spec.to_hf is None:
        raise UserError(f"{source.path}: {spec.name} models cannot be exported: Transformers has no such architecture")
    config_class = getattr(transformers, spec.hf_architecture).config_class
    config = config_class(
        **spec.to_hf(source.config), eos_token_id=ids.get("eos_token_id"), architectures=[spec.hf_architecture]
    )
    config.dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    config.save_pretrained(folder)
    # Transformers before version 5, and what is built on it, looks for the base of the rotary embedding and for its
    # scaling here, and takes 10,000 and none if they are not found.
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["rope_theta"] = source.config.rope_theta
    if (rope := settings["rope_parameters"])["rope_type"] != "default":
        settings["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if not (folder / "generation_config.json").exists():
        stops = ends if len(ends) > 1 else ids.get("eos_token_id")
        transformers.GenerationConfig(**ids | {"eos_token_id": stops}).save_pretrained(folder)
