"""Every parameter's gradient with rows shared out over ranks, against the plain model that sees each document alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

LAYOUTS = {"cp2": (1, 2, 1), "cp2 × tp2": (1, 2, 2), "dp2 × cp2": (2, 2, 1), "cp4": (1, 4, 1)}
EVERY = ["/".join(c) for c in itertools.product(("eager",), ("tied", "untied"), ("documents", "none"))]
EVERY += ["eager/tied/documents-window", "eager/tied/none-window", "eager/untied/documents-experts"]
EVERY += ["eager/tied/documents/selective", "eager/tied/none/full"]
COMPILED = ["/".join(c) for c in itertools.product(("compiled",), ("tied", "untied"), ("documents", "none"))]
COMPILED += ["compiled/untied/documents/selective"]
TRACED = "traced/tied/documents"
CASES = [
    pytest.param(
        layout,
        combination,
        # g++ takes most of the time of a graph.
        marks=[pytest.mark.nightly] if "compiled" in combination or (combination == TRACED and layout != "cp2") else [],
    )
    for layout in LAYOUTS
    for combination in (EVERY[:4] if layout == "cp4" else [*EVERY, TRACED, *COMPILED])
    if not ("experts" in combination and layout == "cp2 × tp2")
]


@pytest.fixture(scope="module")
def differences(request, run_ranks, tmp_path_factory):
    """Differences of a layout: one start of processes for all combinations that are asked for."""
    cache: dict[str, dict[str, dict[str, float]]] = {}
    chosen = [
        (item.callspec.params["layout"], item.callspec.params["combination"])
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]

    def get(layout: str) -> dict[str, dict[str, float]]:
        if layout not in cache:
            dp, cp, tp = LAYOUTS[layout]
            output = tmp_path_factory.mktemp("gradients") / "differences.json"
            names = [name for where, name in chosen if where == layout]
            run_ranks(Path(__file__).with_name("gradients_of_parts.py"), dp * cp * tp, dp, cp, tp, output, *names)
            cache[layout] = json.loads(output.read_text())
        return cache[layout]

    return get


@pytest.mark.parametrize(("layout", "combination"), CASES)
def test_loss_and_gradients_equal_those_of_documents_alone(differences, layout: str, combination: str) -> None:
    found = dict(differences(layout)[combination])
    assert found.pop("loss") < 1e-6
    wrong = {name: difference for name, difference in found.items() if not difference < 1e-5}
    assert not wrong
