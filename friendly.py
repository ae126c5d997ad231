"""How a command ends: errors that a user can mend as one sentence, Ctrl-C and SIGTERM as another."""

from __future__ import annotations

import errno
import functools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import click

from options import complete
from stages.errors import AudioError, UnreachableError, UserError

Function = TypeVar("Function", bound=Callable[..., Any])

SAME_WISH = 2.0  # seconds
AWAY = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT)  # a mount's errors
STOPPED = "Stopped. What was finished is kept; the same command continues from there."


def friendly(function: Function) -> Function:
    """Turn the errors a user can mend into one sentence on stderr and exit status 1.

    Ctrl-C and SIGTERM give a sentence, too, and the statuses that shells give them, 130 and 143 (128 + the signal's number).
    Anything else is a fault of loa and keeps its traceback. With LOA_DEBUG=1 every error does.
    """

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        received: list[int] = []
        try:
            with _stoppable(received):
                return function(*args, **kwargs)
        except KeyboardInterrupt:
            if _debugging():
                raise
            click.echo(f"\n{STOPPED}", err=True)
            sys.exit(128 + (received[0] if received else signal.SIGINT))
        except Exception as error:
            sentence = plain_sentence(error)
            if sentence is None or _debugging():
                raise
            click.echo(f"Error: {complete(sentence)}", err=True)
            sys.exit(1)

    return command  # type: ignore[return-value]


@contextmanager
def _stoppable(received: list[int]) -> Iterator[None]:
    """Within the block SIGINT and SIGTERM become a KeyboardInterrupt of the main thread; `received` says which they were.

    A signal soon after another one is the same wish: wrappers pass on what the terminal has already sent to all. A later
    one breaks off the cleaning up, and after the block it ends the process. What a parent had ignored (nohup) stays ignored.
    """
    mine = (signal.SIG_DFL, signal.default_int_handler)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) in mine}
    if threading.current_thread() is not threading.main_thread():
        before = {}  # only the main thread has handlers
    last = -math.inf

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        again, last = time.monotonic() - last < SAME_WISH, time.monotonic()
        if not again:
            received.append(number)  # Ray raises an exception of its own in place of this one
            raise KeyboardInterrupt

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if received else handler)


def plain_sentence(error: BaseException) -> str | None:
    """The sentence for a user behind `error`, or None when it is not one a user can mend.

    A UserError raised on a Ray worker arrives wrapped, so the causes are searched too.
    """
    sentence = None
    for cause in _causes(error):
        # Ray's wrapper is a UserError itself, with the worker's traceback as its text: the innermost one speaks plainly.
        if isinstance(cause, (UserError, AudioError)):
            sentence = str(cause)
        elif isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return f"no space left on the disk{_of(cause)}; free some or choose another folder with --work"
        elif isinstance(cause, PermissionError):
            what = f"to use {cause.filename}; check its owner" if cause.filename is not None else f"({cause}); check the credentials"
            return f"no permission {what} or choose another folder"
        elif isinstance(cause, OSError) and cause.errno in AWAY:
            return (
                f"{cause.filename or 'a folder'} cannot be reached ({cause.strerror}): the disk or the network behind it is away; "
                "when it is back, repeat the command, which continues where it stopped"
            )
        elif isinstance(cause, UnreachableError):
            return (
                f"the storage cannot be used ({cause}); check its network, endpoint and credentials, then repeat the command, "
                "which continues where it stopped"
            )
        elif isinstance(cause, FileNotFoundError) and (gone := _work_that_is_gone()):
            return f"the work folder {gone} is not there; when it is back, repeat the command, which continues where it stopped"
        elif isinstance(cause, FileNotFoundError) and cause.filename is not None and cause is error:
            return f"{cause.filename} does not exist"
    if sentence is None and isinstance(error, (ImportError, RuntimeError)):
        from stages.public.extra import torchvision_fault  # diffusers and transformers import a torchvision that is there

        return torchvision_fault()
    return sentence


def _work_that_is_gone() -> str | None:
    """The work folder of this call, when it lies on a disk and is not there."""
    context = click.get_current_context(silent=True)
    work = context.params.get("work") if context else None
    return str(work) if work is not None and getattr(work, "local", False) and not work.exists() else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and the errors it wraps, outermost first: Python's `__cause__`, Ray's `cause` and `worker_failures`."""
    waiting, seen = [error], set()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        failures = getattr(current, "worker_failures", None) or {}
        wrapped = [getattr(current, "cause", None), current.__cause__, *failures.values()]
        waiting += [e for e in wrapped if isinstance(e, BaseException)]


def _of(error: OSError) -> str:
    return f" of {error.filename}" if error.filename else ""


def _debugging() -> bool:
    return os.environ.get("LOA_DEBUG", "") not in ("", "0")
