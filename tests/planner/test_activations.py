"""What the forward pass keeps for the backward pass: the formulas, against torch's own hooks."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchtitan_style.models.qwen3_moe.grouped  # noqa: F401  (registers an operation)
from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import Layout
from torchtitan_style.distributed.recompute import apply_activation_checkpoint, keep_outputs_of
from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.lora import add_adapters
from torchtitan_style.models.registry import model_config, spec_of
from torchtitan_style.models.trained import adapted_modules
from torchtitan_style.planner.activations import kept_by_layers, kept_outside
from torchtitan_style.planner.workload import Workload
from torchtitan_style.train.step import freeze

SHAPE = ("--model.flavor", "debug", "--model.hidden_size", "96", "--model.intermediate_size", "320",
         "--model.num_hidden_layers", "4", "--training.seq_len", "128", "--training.local_batch_size", "2",
         "--training.global_batch_size", "-1")  # fmt: skip
EXPERTS = ("--model.name", "qwen3_moe", "--model.num_experts", "16", "--model.num_experts_per_tok", "3")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Kept = dict[int, int]
"""Bytes by address."""


def keep(kept: Kept, tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    kept[storage.data_ptr()] = storage.nbytes()
    return tensor


class Created(TorchDispatchMode):
    """Records what operations return: selective recomputation keeps its tensors in dictionaries of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: list[tuple[StorageWeakRef, int, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages.append((StorageWeakRef(storage), storage.data_ptr(), storage.nbytes()))
        return outputs

    def alive(self) -> Kept:
        return {address: size for reference, address, size in self._storages if not reference.expired()}


def actual(work: Workload) -> int:
    """Bytes kept by the forward pass of the hidden states."""
    config = work.config
    shape, dtype = model_config(config.model), DTYPES[config.training.mixed_precision_param]
    spec = spec_of(config.model.name)
    model: Any = spec.build(shape)
    freeze(model, config)
    add_adapters(model, config.lora, adapted_modules(spec, shape, config.lora))
    model.to(dtype)
    keep_outputs_of(torch.ops.torchtitan_style.grouped_linear.default)  # as parallelize_qwen3_moe does
    apply_activation_checkpoint(model.model.layers, config.activation_checkpoint)
    if config.compile.enable:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager_decomp_partition")  # what is kept is decided before code is generated
    rows, seq_len = config.training.local_batch_size, config.training.seq_len
    ids = torch.randint(0, 256, (rows, seq_len))
    documents = torch.arange(seq_len).expand(rows, -1) // 50 if config.data.document_mask else None
    kept: Kept = {}
    selective = config.activation_checkpoint.mode == "selective"
    created = Created()
    before = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: keep(kept, tensor), lambda tensor: tensor),
        created if selective else contextlib.nullcontext(),
    ):
        hidden = model.model(ids, documents)
    if selective:
        kept |= created.alive()
        kept.pop(hidden.untyped_storage().data_ptr(), None)
    return sum(size for address, size in kept.items() if address not in before)


@pytest.mark.parametrize("overrides", [
    (),
    ("--training.mixed_precision_param", "float32"),
    ("--activation_checkpoint.mode", "full"),
    ("--activation_checkpoint.mode", "selective"),
    ("--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "3"),
    ("--model.dropout", "0.1"),
    ("--data.document_mask", "true"),
    ("--lora.rank", "8"),
    ("--lora.rank", "8", "--lora.dropout", "0.1"),
    ("--training.freeze", "*norm*", "*down_proj*"),
    ("--compile.enable", "true"),
    ("--compile.enable", "true", "--training.mixed_precision_param", "float32"),
    EXPERTS,
    (*EXPERTS, "--training.mixed_precision_param", "float32", "--model.mlp_only_layers", "1"),
    (*EXPERTS, "--activation_checkpoint.mode", "selective"),
    (*EXPERTS, "--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "3",
     "--model.mlp_only_layers", "3"),
    (*EXPERTS, "--compile.enable", "true"),
    (*EXPERTS, "--compile.enable", "true", "--training.mixed_precision_param", "float32"),
])  # fmt: skip
def test_activations_are_what_autograd_keeps(overrides: tuple[str, ...]) -> None:
    torch.compiler.reset()  # after many compilations by other tests, no more are made
    config = load_config(DEFAULT_CONFIG, [*SHAPE, *overrides])
    work = Workload.of_ranks(config, Layout(), on_gpu=False)[0]
    planned = kept_by_layers(work) + kept_outside(work)
    # Counted to the byte but for the state of random generators (5 KB a recomputed block) and scalars.
    with functorch_config.patch(activation_memory_budget=1.0):  # other tests have set it
        assert planned == pytest.approx(actual(work), rel=0.05)
