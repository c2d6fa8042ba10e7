"""What was compared, how far it is apart, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One kind of comparison, over all its cases."""

    name: str
    cases: int
    difference: float
    """The largest of all cases; NaN if there is something that is no number."""
    tolerance: float
    faults: tuple[str, ...] = ()
    """What is wrong, a line each, the worst first."""
    notes: tuple[str, ...] = ()
    """What is otherwise, but not wrong, a line each."""

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # false for NaN


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from the one it should be."""

    name: str
    relative: float
    """2-norm of the difference, as a share of the norm of the right one; infinite if there is none."""
    ratio: float
    """Its norm as a share of the right one's: 0.5 where half of it was dropped."""

    @property
    def severity(self) -> float:
        """For sorting: what is no number is the worst."""
        return math.inf if math.isnan(self.relative) else self.relative

    def __str__(self) -> str:
        return f"{self.name}: off by {self.relative:.1e} of its norm; the norm is {self.ratio:.4g} × the reference"


SMALLEST = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Gradients whose norm is a smaller share of the largest one's are measured as if it were this: those of q, k and their
norms can be small differences of large numbers, with few digits right, in bf16 none."""


def gradient_difference(name: str, found: Tensor | None, right: Tensor, *, smallest: float) -> Difference:
    """How far the gradient ``found`` is from the ``right`` one.

    smallest: a right one with a smaller norm counts as having this one.
    """
    if found is None or found.shape != right.shape:
        return Difference(name, float("inf"), 0.0)
    found, right = found.double(), right.double()
    norm = max(right.norm().item(), smallest, torch.finfo(torch.float32).tiny)
    return Difference(name, (found - right).norm().item() / norm, found.norm().item() / norm)


def gradient_check(name: str, differences: Sequence[Difference], tolerance: float) -> Check:
    """One check of all parameters' gradients, the wrong ones named."""
    worst = sorted(differences, key=lambda d: -d.severity)
    return Check(
        name,
        cases=len(worst),
        difference=worst[0].relative,
        tolerance=tolerance,
        faults=tuple(str(d) for d in worst if not d.relative <= tolerance),
    )


def print_checks(title: str, checks: Sequence[Check], *, most_faults: int = 20) -> bool:
    """Print a table, and below it what is wrong. Returns whether everything is right."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("check", no_wrap=True)
    for column in ("cases", "difference", "tolerance"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for check in checks:
        verdict = Text("ok", style="green") if check.passed else Text("WRONG", style="bold red")
        exact = check.tolerance == 0
        difference = f"{check.difference:g}" if exact else f"{check.difference:.1e}"
        table.add_row(
            check.name, f"{check.cases:,}", difference, "exact" if exact else f"{check.tolerance:.0e}", verdict
        )
    console.print(table)
    for check in checks:
        if check.notes:
            console.print(f"\n{check.name}: {len(check.notes)} of {check.cases:,} differ, but are not wrong:")
            for note in check.notes[:3]:
                console.print(f"  {note}")
            if len(check.notes) > 3:
                console.print(f"  and {len(check.notes) - 3} more")
        if not check.passed:
            console.print(f"\n{check.name}:", style="bold")
            for fault in check.faults[:most_faults]:
                console.print(f"  {fault}")
            if len(check.faults) > most_faults:
                console.print(f"  and {len(check.faults) - most_faults} more")
    return all(check.passed for check in checks)
