"""Errors that a user can mend. Imports nothing: everything may raise them."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the user can mend: the message says what was given, what was expected and what to do."""


class AudioError(ValueError):
    """A recording that cannot be used; the message names it and says what is wrong with it."""
