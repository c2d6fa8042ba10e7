"""How tokens are chosen, as plain data: checked before torch is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchtitan_style.common.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.7
    """Logits are divided by it; 0: always the likeliest token."""
    top_k: int = 40
    """Draw from the k likeliest tokens, and those as likely as the last of them (Fan et al. 2018); 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability, the one that reaches it included
    (nucleus sampling, Holtzman et al. 2020); 1: from all."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the likeliest one's probability (Nguyen et al. 2024); 0: all."""
    repetition_penalty: float = 1.0
    """Logits of the tokens that are in the text, prompt included, are divided by it if positive and multiplied
    if negative (Keskar et al. 2019, section 4.1); 1: nothing is penalised."""

    def check(self, prefix: str = "") -> None:
        """Raise UserError, naming the setting with ``prefix`` in front, if a value has no meaning."""
        for name, right, wanted in (
            (
                "temperature",
                0 <= self.temperature < math.inf,
                "a number of at least 0 (0: always the most likely token)",
            ),
            ("top_k", type(self.top_k) is int and self.top_k >= 0, "a whole number of at least 0 (0: all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1: all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (all tokens) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number above 0 (1: no penalty)"),
        ):
            if not right:
                shown = name.replace("_", "-") if prefix == "--" else name
                raise UserError(f"{prefix}{shown}: must be {wanted}, not {getattr(self, name)}")
