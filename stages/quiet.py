"""Silence of the libraries that load weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
import transformers


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no chatter of the libraries while weights load."""
    loggers = transformers.utils.logging, diffusers.utils.logging
    levels = [logger.get_verbosity() for logger in loggers]
    shown = [logger.is_progress_bar_enabled() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level, bar in zip(loggers, levels, shown, strict=True):
            logger.set_verbosity(level)
            if bar:
                logger.enable_progress_bar()
