"""How many collectives a training step of each layout has: one more than needed costs every step of every run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

BLOCKS, MICROBATCHES = 2, 2
UNITS = BLOCKS + 1  # that FSDP gathers and reduces at once: the blocks, and what is outside of them
NORMS = 4 * BLOCKS + 1

# FSDP: a block is gathered forward and backward, the rest once; the gradients are summed after each microbatch.
# The step: the number of tokens; the loss with the gradient's norm.
FSDP = {"all-gather": MICROBATCHES * (BLOCKS + UNITS), "reduce-scatter": MICROBATCHES * UNITS}
STEP = {"all-reduce": 2}
# Tensor parallelism: attention, MLP and the head or the embedding gather and scatter, forward and backward; the loss
# has a maximum and sums. The norms' gradients are summed once.
TP = {
    "all-gather": MICROBATCHES * 2 * (2 * BLOCKS + 1),
    "reduce-scatter": MICROBATCHES * 2 * (2 * BLOCKS + 1),
    "all-reduce": MICROBATCHES * 2 + NORMS,
}
# Context parallelism: each block gathers keys and values, and sums their gradients.
CP = {"all-gather": MICROBATCHES * BLOCKS, "reduce-scatter": MICROBATCHES * BLOCKS}
COUNTS = {
    "dp2": Counter(FSDP) + Counter(STEP),
    "tp2": Counter(TP) + Counter(STEP),
    # The norms' are summed when FSDP sums, which is after each microbatch.
    "dp2 × tp2": Counter(FSDP) + Counter(TP) + Counter(STEP) + Counter({"all-reduce": (MICROBATCHES - 1) * NORMS}),
}
# An embedding and a head of their own are gathered and reduced by themselves, as is the norm between them.
OWN = {"all-gather": MICROBATCHES * 2, "reduce-scatter": MICROBATCHES * 2}
COUNTS |= {
    "dp2, untied": COUNTS["dp2"] + Counter(OWN),
    "dp2, kept": COUNTS["dp2"] - Counter({"all-gather": MICROBATCHES * BLOCKS}),  # what the blocks' backward needs
    "cp2": Counter(FSDP) + Counter(CP) + Counter(STEP),
    "cp2 × tp2": COUNTS["dp2 × tp2"] + Counter(CP),
}
DEGREES = {
    "dp2": (2, 1, 1),
    "dp2, untied": (2, 1, 1),
    "dp2, kept": (2, 1, 1),
    "tp2": (1, 1, 2),
    "dp2 × tp2": (2, 1, 2),
    "cp2": (1, 2, 1),
    "cp2 × tp2": (1, 2, 2),
}


@pytest.mark.parametrize("layout", COUNTS)
def test_a_step_has_no_more_collectives_than_it_needs(run_ranks, tmp_path: Path, layout: str) -> None:
    dp, cp, tp = DEGREES[layout]
    output = tmp_path / "collectives.json"
    options = "untied" not in layout, "never" if "kept" in layout else "always"
    run_ranks(Path(__file__).parent / "collectives_of_layouts.py", dp * cp * tp, dp, cp, tp, *options, output)
    found = json.loads(output.read_text())
    assert found["counts"] == COUNTS[layout]
    if layout == "cp2":
        # Keys and values, 4 heads of 16 in bf16, of this rank's 8 positions of 2 rows; the gradients are of all 16.
        sent = MICROBATCHES * BLOCKS * 2 * (2 * 8) * (4 * 16) * 2
        assert found["bytes"] == {"all-gather": sent, "reduce-scatter": 2 * sent}
