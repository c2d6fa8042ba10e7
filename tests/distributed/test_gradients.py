"""Every parameter's gradient, in every layout, against the plain single-process model in fp32.

The plain model has the textbook loss over full logits, no sharding, no recomputation, no compiler.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gradients_of_layouts import combinations, is_nightly

LAYOUTS = {
    "1 process": (1, 1, 1),
    "dp2": (1, 2, 1),
    "tp2": (1, 1, 2),
    "dp2 × tp2": (1, 2, 2),
    "dp_replicate2 × dp2": (2, 2, 1),
    "tp4": (1, 1, 4),
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
    chosen = [
        (item.callspec.params["layout"], item.callspec.params["combination"])
        for item in request.session.items
        if item.path == request.path
    ]

    def get(layout: str) -> dict[str, dict[str, float]]:
        if layout not in cache:
            degrees = LAYOUTS[layout]
            output = tmp_path_factory.mktemp("gradients") / "differences.json"
            names = [name for where, name in chosen if where == layout]
            world_size = degrees[0] * degrees[1] * degrees[2]
            run_ranks(Path(__file__).parent / "gradients_of_layouts.py", world_size, *degrees, output, *names)
            cache[layout] = json.loads(output.read_text())
        return cache[layout]

    return get


@pytest.mark.parametrize(("layout", "combination"), CASES)
def test_loss_and_gradients_equal_those_of_the_plain_model(differences, layout: str, combination: str) -> None:
    found = dict(differences(layout)[combination])
    assert found.pop("right guesses") == 0
    # Sums of up to a few hundred fp32 terms in another order: 1e-7 each. A dropped or doubled term is above 1e-2.
    assert found.pop("loss") < 1e-6
    wrong = {name: difference for name, difference in found.items() if not difference < 1e-5}
    assert not wrong
