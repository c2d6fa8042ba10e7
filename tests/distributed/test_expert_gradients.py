"""Qwen3-MoE in every layout against one process with the loop over experts and Transformers' auxiliary loss, in fp32:
every parameter's gradient, over two microbatches."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from gradients_of_experts import CONFIG, combinations, is_nightly

# dp_replicate, dp_shard, tp, ep
LAYOUTS = {
    "1 process": (1, 1, 1, 1),
    "dp2": (1, 2, 1, 1),
    "ep2": (1, 2, 1, 2),
    "tp2": (1, 1, 2, 1),
    "ep2 × tp2": (1, 2, 2, 2),
    "ep2 × dp2": (1, 4, 1, 2),
    "dp_replicate2 × ep2": (2, 2, 1, 2),
}

CASES = [
    pytest.param(layout, "/".join(c), marks=[pytest.mark.nightly] if is_nightly(*degrees, *c) else [])
    for layout, degrees in LAYOUTS.items()
    for c in combinations(*degrees)
]


@pytest.fixture(scope="module")
def differences(request, run_ranks, tmp_path_factory):
    """Differences of a layout, computed when first asked for: one start of processes per layout, for all the
    combinations that are asked for."""
    cache: dict[str, dict[str, dict[str, float]]] = {}
    chosen = {
        (item.callspec.params["layout"], item.callspec.params["combination"])
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    chosen |= {(layout, "eager/none") for layout in ("dp2", "ep2")}  # whose bytes are looked at

    def get(layout: str) -> dict[str, dict[str, float]]:
        if layout not in cache:
            degrees = LAYOUTS[layout]
            output = tmp_path_factory.mktemp("gradients") / "differences.json"
            names = sorted(name for where, name in chosen if where == layout)
            script = Path(__file__).parent / "gradients_of_experts.py"
            run_ranks(script, math.prod(degrees[:3]), *degrees, output, *names)
            cache[layout] = json.loads(output.read_text())
        return cache[layout]

    return get


@pytest.mark.parametrize(("layout", "combination"), CASES)
def test_losses_and_gradients_equal_those_of_the_loop(differences, layout: str, combination: str) -> None:
    found = dict(differences(layout)[combination])
    del found["bytes"]
    # By FSDP's hooks where experts are sharded by themselves, and by the exchange of tokens: docs/moe.md.
    expected = {"1 process": 0, "dp2": 0, "tp2": 1}.get(layout, 2)
    assert found.pop("interruptions", expected) == expected
    # Sums of up to a few hundred fp32 terms in another order: 1e-7 each. A dropped or doubled term is above 1e-2.
    assert found.pop("loss") < 1e-6
    assert found.pop("aux loss") < 1e-6
    assert found.pop("norm") < 1e-6
    wrong = {name: difference for name, difference in found.items() if not difference < 1e-5}
    assert not wrong


def test_bytes_sent_for_a_token(differences) -> None:
    """At most k hidden states there and k back, forward and backward: about half stay with two ranks. The second
    microbatch is routed once more beforehand, for the counts."""
    found = differences("ep2")["eager/none"]["bytes"]
    tokens, layers = 8 * 32, CONFIG.num_sparse_layers
    passes = 2 + 1 / 2  # forward, backward, and forward once more for one of two microbatches
    most = passes * tokens * layers * 2 * CONFIG.num_experts_per_tok * CONFIG.hidden_size * 4
    assert 0.35 * most < found < 0.65 * most
    assert differences("dp2")["eager/none"]["bytes"] == 0
