"""Reading weights, wherever they are saved, into a model of any layout or one tensor after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchtitan_style.common.errors import UserError
from torchtitan_style.distributed.local import local_part
from torchtitan_style.models.hf_folder import HFFolder
from torchtitan_style.models.qwen3.hf import parameter_shapes

from .reader import SafeReader, without_warnings
from .saved import SavedModel

__all__ = ["load_weights", "stored_dtypes"]


@torch.no_grad()
def load_weights(
    source: HFFolder | SavedModel, parameters: Mapping[str, Tensor], *, advance: Callable[[], None] = lambda: None
) -> None:
    """Fill ``parameters``, by name, plain tensors or DTensors, from ``source``; each rank reads its own part.

    Values are converted to the type of the parameter. advance: called as reading gets on, from any thread.
    """
    if isinstance(source, SavedModel):
        tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
        reader = SafeReader(source.path, advance=advance)
        reader.check_metadata()
        with without_warnings():
            dcp.load(tensors, storage_reader=reader)
        return
    # In the order of the files, so that each is opened once.
    stored = source.tensors
    for name in sorted(parameters, key=lambda name: (stored[name].file, stored[name].start)):
        local, where = local_part(parameters[name])
        if local.numel():
            local.copy_(source.read(name, where))
            advance()


def stored_dtypes(source: HFFolder | SavedModel) -> dict[str, torch.dtype]:
    """The type that each of the model's parameters is stored in, by name.

    Raises UserError if a checkpoint of ours lacks one of them.
    """
    shapes = parameter_shapes(source.config)
    if isinstance(source, HFFolder):
        return {name: getattr(torch, source.tensors[name].dtype) for name in source.tensors if name in shapes}
    entries = SafeReader(source.path).read_metadata().state_dict_metadata
    found = {name: entries.get(f"model.{name}") for name in shapes}
    for name, entry in found.items():
        if not isinstance(entry, TensorStorageMetadata) or tuple(entry.size) != shapes[name]:
            raise UserError(f"{source.path}: has no {name} of shape {shapes[name]}, as its config.toml would have it")
    return {name: entry.properties.dtype for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
