"""Errors that a user can mend. Imports nothing heavy: everything may raise them."""

from __future__ import annotations

from collections.abc import Iterable

NAMED = 3  # how many names a message lists


class UserError(ValueError):
    """A mistake the user can mend: the message says what was given, what was expected and what to do."""


class UnreachableError(OSError):
    """Storage behind a URL did not answer; the message holds what its library said."""


class AudioError(ValueError):
    """A recording that cannot be used; the message names it and says what is wrong with it."""


def some(names: Iterable[str]) -> str:
    """The first of many names, in one line of a message."""
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:NAMED]) + (f" and {len(unique) - NAMED} more" if len(unique) > NAMED else "")
