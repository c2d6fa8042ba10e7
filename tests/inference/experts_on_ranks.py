"""Run by test_experts.py as ranks that share a model's experts: text, logits, and what is read of the experts.

Arguments: the model's folder, a JSON file with prompts and token ids, the file for the results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from torchtitan_style import load_model
from torchtitan_style.config.layout import Layout
from torchtitan_style.distributed.world import destroy_world, init_world
from torchtitan_style.inference.cache import KVCache
from torchtitan_style.models.qwen3_moe import inference
from torchtitan_style.train.stopping import ending_at_once


@torch.inference_mode()
def main() -> None:
    folder, given, output = sys.argv[1:]
    prompts, ids = json.loads(Path(given).read_text(encoding="utf-8"))
    world = init_world(Layout(tp=2), timeout_seconds=60)
    model = load_model(folder, dtype=torch.float32, world=world)
    texts = model.generate(prompts, temperature=0.0, max_new_tokens=16)

    grouped: list[int] = []
    read: list[int] = []
    by_group, one_token = inference.grouped_experts, inference._SplitExperts._one_token

    def counting(self: inference._SplitExperts, x: torch.Tensor, counts: torch.Tensor, chosen: int) -> torch.Tensor:
        read.append(chosen)
        return one_token(self, x, counts, chosen)

    inference._SplitExperts._one_token = counting
    inference.grouped_experts = lambda *args: (grouped.append(len(args[0])), by_group(*args))[1]
    cache, row = KVCache(model.config.windows, capacity=len(ids)), torch.tensor([ids])
    logits = []
    for start, stop in ((0, len(ids) - 1), (len(ids) - 1, len(ids))):
        grouped.clear()
        new = row[:, start:stop]
        logits.append(model.model(new, positions=cache.positions(new), cache=cache)[0, -1].tolist())
        cache.advance(stop - start)
    chosen = torch.tensor(sum(read))
    dist.all_reduce(chosen)
    if world.is_main:
        found = {"texts": texts, "logits": logits, "chosen": chosen.item(), "grouped": grouped}
        Path(output).write_text(json.dumps(found), encoding="utf-8")
    destroy_world()


if __name__ == "__main__":
    with ending_at_once():
        main()
