"""Reading weights, wherever they are saved, into a model of any layout or one tensor after another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchtitan_style.common.errors import UserError
from torchtitan_style.distributed.local import local_part, local_tensor
from torchtitan_style.models.hf_folder import HFFolder
from torchtitan_style.models.spec import Shapes
from torchtitan_style.models.trained import DOWN, UP, adapted_modules, adapter_shapes

from .reader import SafeReader, reason_of, without_warnings
from .saved import SavedModel


@torch.no_grad()
def load_weights(
    source: HFFolder | SavedModel, parameters: Mapping[str, Tensor], *, advance: Callable[[], None] = lambda: None
) -> None:
    """Fill ``parameters``, by name, plain tensors or DTensors, from ``source``; each rank reads its own part.

    Values are converted to the type of the parameter. Adapters are merged into the weights. advance: called as reading
    gets on, from any thread.
    """
    if isinstance(source, SavedModel) and source.lora.rank:
        load_weights(source.base, parameters, advance=advance)
        _add_adapters(source, parameters, advance)
        return
    if isinstance(source, SavedModel):
        load_saved(source, parameters, advance=advance)
        return
    # In the order of the files, so that each is opened once.
    parts = [
        (tensor, parameters[name])
        for name, tensors in source.spec.disk_tensors(source.config).items()
        if name in parameters
        for tensor in tensors
    ]
    stored = source.tensors
    for tensor, parameter in sorted(parts, key=lambda part: (stored[part[0].name].file, stored[part[0].name].start)):
        if copy_local_part(parameter, tensor.part, functools.partial(source.read, tensor.name)):
            advance()


def load_saved(
    source: SavedModel, parameters: Mapping[str, Tensor], *, advance: Callable[[], None] = lambda: None
) -> None:
    """Fill ``parameters`` with what is in the checkpoint itself under their names: of adapters, those alone."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    reader = SafeReader(source.path, advance=advance)
    reader.check_metadata()
    try:
        with without_warnings():
            dcp.load(tensors, storage_reader=reader)
    except CheckpointException as error:  # which is no Exception
        raise UserError(f"{source.path} cannot be loaded: {reason_of(error)}") from None


def _add_adapters(source: SavedModel, parameters: Mapping[str, Tensor], advance: Callable[[], None]) -> None:
    """Merge the adapters in ``source`` into the weights that they adapt: W + alpha/rank · B·A, computed in fp32."""
    adapted = adapted_modules(source.spec, source.config, source.lora)
    weights = {module: parameters[f"{module}.weight"] for module in adapted if f"{module}.weight" in parameters}
    shapes = adapter_shapes(source.spec, source.config, source.lora)
    factors = {
        module + end: torch.empty(shapes[module + end], device=local_tensor(weight).device)
        for module, weight in weights.items()
        for end in (DOWN, UP)
    }
    load_saved(source, factors, advance=advance)
    for module, weight in weights.items():
        local, (rows, columns) = local_part(weight)
        change = source.lora.scale * (factors[module + UP][rows] @ factors[module + DOWN][:, columns])
        local.copy_(local.float() + change)


def copy_local_part(
    parameter: Tensor, part: tuple[int | slice, ...], read: Callable[[tuple[slice, ...]], Tensor]
) -> bool:
    """Fill what this rank holds of ``parameter[part]``. Whether that is anything.

    read: called with the slices of ``parameter[part]`` that are wanted; returns their values.
    """
    local, where = local_part(parameter)
    target: list[int | slice] = []
    wanted: list[slice] = []
    for dim, held in enumerate(where):
        index = part[dim] if dim < len(part) else slice(None)
        if isinstance(index, int):
            if not held.start <= index < held.stop:
                return False
            target.append(index - held.start)
            continue
        first, last, _ = index.indices(parameter.shape[dim])
        low, high = max(held.start, first), min(held.stop, last)
        if low >= high:
            return False
        target.append(slice(low - held.start, high - held.start))
        wanted.append(slice(low - first, high - first))
    local[tuple(target)].copy_(read(tuple(wanted)))
    return True


def stored_dtypes(source: HFFolder | SavedModel) -> dict[str, torch.dtype]:
    """The type that each of the model's parameters is stored in, by name; of adapters, those of the weights that they
    belong to.

    Raises UserError if a checkpoint of ours lacks one of them.
    """
    if isinstance(source, SavedModel) and source.lora.rank:
        _saved_dtypes(source, adapter_shapes(source.spec, source.config, source.lora))
        return stored_dtypes(source.base)
    if isinstance(source, HFFolder):
        tensors = source.spec.disk_tensors(source.config)
        return {name: getattr(torch, source.tensors[parts[0].name].dtype) for name, parts in tensors.items()}
    return _saved_dtypes(source, source.spec.parameter_shapes(source.config))


def _saved_dtypes(source: SavedModel, shapes: Shapes) -> dict[str, torch.dtype]:
    """The types of parameters of these shapes in the checkpoint itself. Raises UserError if it lacks one."""
    entries = SafeReader(source.path).read_metadata().state_dict_metadata
    found = {name: entries.get(f"model.{name}") for name in shapes}
    for name, entry in found.items():
        if not isinstance(entry, TensorStorageMetadata) or tuple(entry.size) != shapes[name]:
            raise UserError(f"{source.path}: has no {name} of shape {shapes[name]}, which its config.toml asks for")
    return {name: entry.properties.dtype for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
