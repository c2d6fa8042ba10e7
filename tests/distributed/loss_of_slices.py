"""Run by test_loss.py as the ranks that share out the vocabulary: the loss and every gradient against the whole
matrix's, traced by the compiler and not. The file gets the largest relative difference of each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.tracing import traced
from torchtitan_style.distributed import loss as loss_module
from torchtitan_style.distributed.loss import chunked_cross_entropy
from torchtitan_style.models.qwen3.model import token_loss

TOKENS, VOCABULARY, WIDTH, Z_LOSS = 60, 96, 16, 0.3


def results(function, parts: slice) -> list[torch.Tensor]:
    """Loss, right guesses, gradients of hidden states and of the slice ``parts`` of the matrix."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, TOKENS // 2, WIDTH, generator=generator)
    whole = torch.randn(VOCABULARY, WIDTH, generator=generator)
    labels = torch.randint(0, VOCABULARY, (2, TOKENS // 2), generator=generator)
    labels[0, ::3] = -100
    labels[1, ::4] = (hidden @ whole.T).argmax(-1)[1, ::4]  # so that some guesses are right
    hidden.requires_grad_()
    weight = whole[parts].clone().requires_grad_()
    loss, right = function(hidden, weight, labels, Z_LOSS)
    (loss / 7).backward()
    return [loss.detach(), right, hidden.grad, weight.grad]


def main(file: Path) -> None:
    dist.init_process_group("gloo")
    loss_module.LOGITS_PER_CHUNK, loss_module.MIN_TOKENS_PER_CHUNK = 1, {"cpu": 20}  # three chunks
    rows = VOCABULARY // dist.get_world_size()
    own = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
    expected = results(token_loss, slice(None))
    expected[3] = expected[3][own]
    worst = {}
    for compiled in (False, True):
        with traced():
            function = chunked_cross_entropy(dist.group.WORLD, compiled=compiled)
        found = results(function, own)
        dist.all_reduce(found[2])  # each rank has its slice's part
        for name, a, b in zip(("loss", "right", "hidden", "weight"), found, expected, strict=True):
            error = ((a - b).abs().max() / b.abs().max()).double()
            dist.all_reduce(error, op=dist.ReduceOp.MAX)
            worst[f"{name}, {'compiled' if compiled else 'eager'}"] = error.item()
    if dist.get_rank() == 0:
        file.write_text(json.dumps(worst))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
