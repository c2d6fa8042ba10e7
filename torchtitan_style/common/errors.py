"""The exceptions that end a run with a message instead of a traceback."""

from __future__ import annotations

__all__ = ["RunError", "UserError"]


class UserError(Exception):
    """A mistake that a person can put right: what was wrong, where, and what to do, in words for them.

    Commands print it without a traceback and exit with status 2.
    """

    everywhere = True
    """Whether all ranks raise it, so that one is enough to print it."""


class RunError(Exception):
    """A run that could not go on, though nobody made a mistake: exit status 1, no traceback."""

    everywhere = True
    """As for UserError."""
