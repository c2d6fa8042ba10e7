"""The exceptions that end a run with a message instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that a person can correct: the message says what was found, where, and what to do.

    Commands print it without a traceback and exit with status 2.
    """


class RunError(Exception):
    """A run that cannot continue, though nobody made a mistake: exit status 1, no traceback."""
