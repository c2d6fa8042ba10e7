"""Output of a text command: the model's text goes to standard output, messages to standard error."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

from torchtitan_style.common.terminal import without_control


class Screen:
    """Both streams, styled where they are terminals."""

    def __init__(self) -> None:
        self._out = Console(highlight=False, soft_wrap=True)
        self._about = Console(highlight=False, soft_wrap=True, stderr=True)

    def write(self, text: str, style: str = "") -> None:
        """Write text unchanged and flush; on a terminal without control characters."""
        if not text:
            return
        if self._out.is_terminal:
            self._out.print(Text(without_control(text), style=style), end="")
        else:
            sys.stdout.write(text)
        sys.stdout.flush()

    def say(self, text: str, style: str = "dim") -> None:
        """Print a message."""
        self._about.print(Text(text, style=style))
