"""Text from a model on a terminal."""

from __future__ import annotations

_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def without_control(text: str) -> str:
    """``text`` with control characters replaced: a model may write any, and terminals obey them."""
    return text.translate(_CONTROL)
