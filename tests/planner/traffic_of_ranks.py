"""Run by test_traffic.py as ranks: what they send in a step, as the collectives are called, and what tensor-parallel
ranks keep for the backward pass.

Arguments: a file with the cases as JSON, the file for the means over the ranks.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import Layout, reduces_each_microbatch
from torchtitan_style.data.loader import Microbatch
from torchtitan_style.distributed.gloo import one_thread_each
from torchtitan_style.distributed.world import init_world
from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.qwen3.attention import document_positions
from torchtitan_style.train.balance import Balance
from torchtitan_style.train.step import build_training_model, forward_backward
from torchtitan_style.train.stopping import ending_at_once

KINDS = {"allgather_base": "all-gather", "all_gather_into_tensor": "all-gather", "allreduce": "all-reduce",
         "all_reduce": "all-reduce", "reduce_scatter_base": "reduce-scatter",
         "reduce_scatter_tensor": "reduce-scatter", "alltoall_base": "all-to-all"}  # fmt: skip


class Sent(TorchDispatchMode):
    """Bytes of the collectives by kind: of the larger side, of an all-to-all what is sent. Counts of tokens, in fp64
    and int64, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        kind = KINDS.get(name.strip("_"))
        if "c10d" in namespace and kind:
            tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
            sizes = [x.nbytes for x in tensors if x.dtype in (torch.bfloat16, torch.float32)]
            if sizes:
                self.bytes[kind] += sizes[1] if kind == "all-to-all" else max(sizes)
        return out


def address(tensor: torch.Tensor) -> int:
    """Of the storage, and not of its memory, which FSDP frees and others take."""
    return int(getattr(tensor, "_local_tensor", tensor).untyped_storage()._cdata)


def kept_by_forward(model: Any, batch: Microbatch) -> int:
    kept: dict[int, int] = {}
    weights: set[int] = set()
    """Of the modules that are being computed: FSDP frees them afterwards, and activations may take their addresses."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if address(tensor) not in weights:
            kept[address(tensor)] = getattr(tensor, "_local_tensor", tensor).untyped_storage().nbytes()
        return tensor

    def note_weights(module: Any, inputs: Any) -> None:  # FSDP has gathered them by now
        weights.update(address(parameter) for parameter in module.parameters(recurse=False))

    def forget_weights(module: Any, inputs: Any, outputs: Any) -> None:
        weights.difference_update(address(parameter) for parameter in module.parameters(recurse=False))

    for module in model.modules():
        module.register_forward_pre_hook(note_weights)
        module.register_forward_hook(forget_weights)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*batch)
    del loss
    return sum(kept.values())


def found(case: dict[str, Any]) -> dict[str, Any]:
    layout = Layout(**case["layout"])
    config = load_config(DEFAULT_CONFIG, case["overrides"], world_size=layout.world_size)
    world = init_world(layout, timeout_seconds=60)
    model = build_training_model(config, world, warn=print)
    ids = torch.randint(0, 256, (config.training.local_batch_size, config.training.seq_len))
    rows = Microbatch(ids, ids)
    if config.data.document_mask:
        documents = torch.arange(ids.shape[1]).expand_as(ids) // 50
        rows = Microbatch(ids, ids, documents, document_positions(documents))
    batch = rows.of_part(world.part)
    tokens = torch.tensor(ids.numel())
    each = reduces_each_microbatch(config.parallelism, world.layout)
    parts = [batch] * case["microbatches"]
    for _ in range(2):  # the first pass sets FSDP up
        model.zero_grad()
        with Sent() as sent:
            forward_backward(model, parts, tokens, Balance.of(model, parts, world), reduce_each=each)
    kept = kept_by_forward(model, batch) if case["keeps"] else 0
    every: list[Any] = [None] * layout.world_size
    dist.all_gather_object(every, (sent.bytes, kept))  # ranks have more or fewer tokens for their experts
    return {
        "sent": {kind: sum(sent[kind] for sent, _ in every) / len(every) for kind in sent.bytes},
        "kept": sum(kept for _, kept in every) / len(every),
    }


@one_thread_each()
def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    results = [found(case) for case in cases]
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    with ending_at_once():
        main()
