"""Which experts a layout sends tokens to, against the routers of the plain model.

Where two experts are as likely, rounding decides, and the token's output is another one. That is no fault of a layout:
such tokens are counted, and told apart from those that were sent to the wrong experts.

Shapes: B rows, T positions, L layers with experts, E experts, k experts per token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchtitan_style.data.loader import Microbatch, take_part
from torchtitan_style.distributed.world import World
from torchtitan_style.train.step import evaluating

from .report import Check

TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-2}
"""How far an expert's logit may be behind that of the one in whose place it was taken, as a share of the largest."""


@dataclass(frozen=True)
class Otherwise:
    """Tokens of one rank that were not sent to the experts that the plain model sends them to."""

    tokens: int
    """All that it has, once for each layer with experts."""
    ties: tuple[str, ...]
    """Those whose experts are as likely, by layer, row and position."""
    wrong: tuple[str, ...]
    """The others."""


def routed_otherwise(
    model: Any, microbatches: Sequence[Microbatch], logits: Tensor, world: World, *, precision: str
) -> Otherwise:
    """Route this rank's tokens, uncompiled. Called by all ranks.

    microbatches: the rank's rows, or its part of them. logits: [B, T, L, E], the plain model's, of all rows.
    """
    found: dict[int, Tensor] = {}
    """Of each layer with experts that this rank has, counted from 0 among all: the chosen experts."""
    sparse = [layer for layer in range(model.config.num_hidden_layers) if model.config.is_sparse(layer)]

    def watch(gate: nn.Module, layer: int) -> RemovableHandle:
        return gate.register_forward_hook(lambda _module, _inputs, output: found.update({layer: output[2]}))

    named = [(re.search(r"layers\.(\d+)\.mlp\.gate$", name), module) for name, module in model.named_modules()]
    hooks = [watch(module, sparse.index(int(match[1]))) for match, module in named if match]
    tp, tp_rank = world.layout.tp, world.mesh["tp"].get_local_rank()
    row = world.dp_rank * sum(len(part.inputs) for part in microbatches)
    tokens, ties, wrong = 0, list[str](), list[str]()
    with evaluating(model):
        for part in microbatches:
            found.clear()
            model(*part)
            rows, length = len(part.inputs), part.inputs.shape[1] // tp
            mine = slice(tp_rank * length, (tp_rank + 1) * length)
            right = take_part(logits[row : row + rows], world.part)[:, mine].to(world.device)  # [b, t, L, E]
            places = take_part(torch.arange(logits.shape[1])[None], world.part)[0, mine]
            for layer, experts in sorted(found.items()):
                chosen, expected = experts.view(rows, length, -1), right[:, :, layer]
                best = expected.topk(chosen.shape[-1]).indices
                other = (chosen.sort(-1).values != best.sort(-1).values).any(-1)
                behind = expected.gather(-1, best).amin(-1) - expected.gather(-1, chosen).amin(-1)
                near = behind <= TOLERANCES[precision] * expected.abs().max()
                tokens += other.numel()
                for names, mask in ((ties, other & near), (wrong, other & ~near)):
                    names += [
                        f"layer {layer} of those with experts, row {row + r}, position {places[t]}"
                        for r, t in mask.nonzero().tolist()
                    ]
            row += rows
    for hook in hooks:
        hook.remove()
    return Otherwise(tokens, tuple(ties), tuple(wrong))


def check_routing(everyone: Sequence[Otherwise]) -> tuple[Check, float]:
    """The check over all ranks, and by how much gradients may differ more than they do by rounding.

    Gradients of different tokens are about orthogonal, so where a share q of them is exchanged for others, the sum
    changes by about √(2q) of its norm; 2·√q, as experts do not all have the same share.
    """
    ties = [name for each in everyone for name in each.ties]
    wrong = [name for each in everyone for name in each.wrong]
    tokens = sum(each.tokens for each in everyone)
    notes = tuple(f"experts that are as likely: {name}" for name in ties)
    check = Check("experts of every token", tokens, len(wrong), 0, tuple(wrong), notes)
    return check, 2 * math.sqrt(len(ties) / tokens)
