"""Every parameter's gradient over a pipeline, with every schedule and layout, against the plain single-process model.

Both go through what trains: the model is built by ``build_training_model``, and the step is ``forward_backward``.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from torchtitan_style.launch.preflight import OLDEST_TORCH_OF, torch_version

EXPERTS = (
    "--model.name/qwen3_moe/--model.mlp_only_layers/1/--model.initializer_range/0.2"
    "/--model.router_aux_loss_coef/0.5/--model.router_z_loss_coef/0.1"
)
"""The routers' losses as large as others, so that a part of them that is missing shows; the second layer is dense."""
EP = "--parallelism.expert_parallel_degree/2"

LAYOUTS = {
    "pp2": (2, 1, 1, 1, 1),
    "pp2 × dp2": (2, 1, 2, 1, 1),
    "pp2 × cp2": (2, 1, 1, 2, 1),
    "pp2 × tp2": (2, 1, 1, 1, 2),
    "pp2 × dp_replicate2": (2, 2, 1, 1, 1),
    "pp4": (4, 1, 1, 1, 1),
}
"""(pp, dp_replicate, dp_shard, cp, tp)."""

EACH_DAY = {
    "pp2": [
        "1F1B/tied/eager/documents/5",
        "1F1B/untied/eager/none/5/--training.z_loss/0.01",
        "1F1B/tied/eager/none/3/--training.global_batch_size/2",  # fewer microbatches than stages
        "1F1B/tied/compiled/none/4",  # the graphs of test_gradients.py
        "GPipe/untied/eager/documents/2",
        "Interleaved1F1B/tied/eager/none/7",
        "Interleaved1F1B/tied/eager/none/2",  # embedding and head are stages of their own
        "ZBVZeroBubble/tied/eager/documents/5",
        "ZBVZeroBubble/untied/eager/none/4/--activation_checkpoint.mode/full",
        "1F1B/tied/eager/none/5/--parallelism.pipeline_parallel_blocks/[1, 4]",
        f"1F1B/tied/eager/documents/3/{EXPERTS}",
        f"Interleaved1F1B/untied/eager/none/4/{EXPERTS}",
    ],
    "pp2 × dp2": [
        "1F1B/tied/eager/documents/5",
        "1F1B/tied/eager/none/4/--parallelism.fsdp_reshard_after_forward/always",
        "ZBVZeroBubble/tied/eager/none/5",
        "Interleaved1F1B/untied/eager/documents/5/--activation_checkpoint.mode/full",
        f"1F1B/untied/eager/documents/3/{EXPERTS}/{EP}",
        f"Interleaved1F1B/tied/eager/none/5/{EXPERTS}/--activation_checkpoint.mode/full/{EP}",
    ],
    "pp2 × cp2": ["1F1B/tied/eager/documents/5", "Interleaved1F1B/untied/eager/none/5"],
    "pp2 × tp2": [
        "1F1B/tied/eager/documents/5",
        "ZBVZeroBubble/untied/eager/none/5",
        "Interleaved1F1B/tied/eager/none/5/--activation_checkpoint.mode/selective",
        f"1F1B/tied/eager/none/3/{EXPERTS}",
    ],
    "pp4": ["Interleaved1F1B/tied/eager/documents/7"],  # eight stages, one of them without a block
}
"""Schedule/embeddings/compilation/document masks/blocks/more keys."""

EACH_NIGHT = {
    **{
        layout: [
            f"{'/'.join(case)}/5"
            for case in itertools.product(
                ("1F1B", "GPipe", "Interleaved1F1B", "ZBVZeroBubble"),
                ("tied", "untied"),
                ("eager", "compiled"),
                ("documents", "none"),
            )
            if case[::2] != ("ZBVZeroBubble", "compiled")
        ]
        for layout in ("pp2", "pp2 × dp2", "pp2 × cp2", "pp2 × tp2")
    },
    "pp2 × dp_replicate2": ["1F1B/tied/eager/documents/5", "ZBVZeroBubble/tied/eager/none/5"],
    "pp4": ["1F1B/untied/eager/none/7", "ZBVZeroBubble/tied/eager/none/7"],
}
EACH_NIGHT["pp2"] += [f"ZBVZeroBubble/tied/eager/none/4/{EXPERTS}", f"1F1B/tied/compiled/none/4/{EXPERTS}"]
EACH_NIGHT["pp2 × dp2"] += [
    f"ZBVZeroBubble/untied/eager/documents/5/{EXPERTS}/--activation_checkpoint.mode/full/{EP}",
    f"Interleaved1F1B/tied/eager/none/5/{EXPERTS}/{EP}",
]

CASES = [
    *(pytest.param(layout, case) for layout, cases in EACH_DAY.items() for case in cases),
    *(
        pytest.param(layout, case, marks=pytest.mark.nightly)
        for layout, cases in EACH_NIGHT.items()
        for case in cases
        if case not in EACH_DAY.get(layout, [])
    ),
]


def runs_here(case: str) -> bool:
    """Whether torch is new enough for the schedule."""
    return torch_version() >= OLDEST_TORCH_OF.get(case.partition("/")[0], (0, 0))


@pytest.fixture(scope="module")
def differences(request, run_ranks, tmp_path_factory) -> Any:
    """differences(layout): of all its cases that are asked for, from one start of processes."""
    cache: dict[str, dict[str, dict[str, float]]] = {}
    chosen = [
        (item.callspec.params["layout"], item.callspec.params["case"])
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    chosen = [(where, name) for where, name in chosen if runs_here(name)]

    def get(layout: str) -> dict[str, dict[str, float]]:
        if layout not in cache:
            degrees = LAYOUTS[layout]
            output = tmp_path_factory.mktemp("pipelines") / "differences.json"
            names = [name for where, name in chosen if where == layout]
            script = Path(__file__).parent / "gradients_of_pipelines.py"
            run_ranks(script, math.prod(degrees), *degrees, output, *names)
            cache[layout] = json.loads(output.read_text())
        return cache[layout]

    return get


@pytest.mark.parametrize(("layout", "case"), CASES)
def test_loss_and_gradients_equal_those_of_the_plain_model(differences, layout: str, case: str) -> None:
    if not runs_here(case):
        pytest.skip("torch is too old for this schedule")
    found = dict(differences(layout)[case])
    assert found.pop("right guesses") == found.pop("names") == 0
    sent = found.pop("sends"), found.pop("bytes sent")
    if torch_version() >= (2, 13):  # before, each pair of stages sends a number more, to connect
        assert sent == (0, 0)  # as planned
    # Sums of fp32 terms in another order: 1e-7 each. A dropped or doubled term is above 1e-2.
    assert found.pop("loss") < 1e-6
    assert found.pop("validation loss", 0.0) < 1e-6
    wrong = {name: difference for name, difference in found.items() if not difference < 1e-5}
    assert not wrong
