"""Trainings in processes of their own, forked from one that has imported everything: to kill one costs seconds, not a quarter minute."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from stages import STAGES

PRELOADED = ["pipelines.train", "pipelines.training.loop", "pipelines.training.launch", *(f"stages.{stage}.training" for stage in STAGES)]


def start(log: Path, function: Callable[..., Any], *args: Any, **kwargs: Any) -> BaseProcess:
    """Call a function of a module in a process with this one's environment; what it says goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_call, args=(dict(os.environ), log, function, args, kwargs))
    process.start()
    return process


def start_training(log: Path, *args: Any, **kwargs: Any) -> BaseProcess:
    """`train_stage` as the command runs it: signals end it with a sentence, errors of the user with status 1."""
    return start(log, train, *args, **kwargs)


def train(*args: Any, **kwargs: Any) -> None:
    """`train_stage`, ended as a command is."""
    from friendly import friendly
    from pipelines.train import train_stage

    friendly(train_stage)(*args, **kwargs)


def _call(
    environment: Mapping[str, str], log: Path, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as said:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(said.fileno(), stream.fileno())
    function(*args, **kwargs)
