"""The one exception for mistakes a person can put right."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(Exception):
    """What was wrong, where, and what to do about it, in words for the user.

    Commands print it without a traceback and exit with status 2.
    """
