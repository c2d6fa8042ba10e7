"""What tensor parallelism needs beside torch's own styles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle


class NormOfShard(ParallelStyle):
    """A norm of the rows that a rank holds, on plain tensors: a norm is a dozen small operations, each of which
    would be dispatched in Python as one of DTensors (docs/performance.md)."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """module: an ``RMSNorm``, or something in its place without a weight, which is left as it is."""
        if getattr(module, "weight", None) is None:
            return module
        given: Any = module.weight
        weight = DTensor.from_local(given.detach(), device_mesh, [Replicate()], run_check=False)
        module.weight = nn.Parameter(weight, requires_grad=given.requires_grad)
        module.read_weight = _read_weight  # type: ignore[assignment]
        return module


def _read_weight(weight: DTensor) -> Tensor:
    """Each rank finds the part of the weight's gradient that comes from its rows. FSDP2, which a model on several tp
    ranks is always wrapped in, finds the gradient partial and the weight replicated, and sums over tp."""
    return weight.to_local(grad_placements=[Partial()])


class VocabParallelHead(ColwiseParallel):
    """Vocabulary split over the ranks; labels go in beside the hidden states, and the loss, a plain
    number, comes out as it is."""

    @staticmethod
    def _prepare_input_fn(layouts: Any, desired: Any, module: Any, inputs: Any, mesh: DeviceMesh) -> Any:
        hidden, *labels = inputs
        return ColwiseParallel._prepare_input_fn(layouts, desired, module, (hidden,), mesh), *labels

    @staticmethod
    def _prepare_output_fn(layouts: Any, use_local: bool, module: Any, output: Any, mesh: DeviceMesh) -> Any:
        if not isinstance(output, DTensor):
            return output
        return ColwiseParallel._prepare_output_fn(layouts, use_local, module, output, mesh)


def wait_for_output(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Have the embedding's collective finished before a compiled block takes its result.

    A compiled graph drops the gradient towards an input that is still in flight (measured on torch
    2.13: the embedding's gradient is zero). An operation on it waits.
    """
    return output * 1.0


def with_gradient(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Have gradients computed of the output of a frozen module, though nobody wants them."""
    return output.requires_grad_() if torch.is_grad_enabled() else output
