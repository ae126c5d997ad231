"""Leases: who works on something right now, and whether they still live.

A lease is a small file that its holder writes anew every few seconds. It is stale when its process is gone, where that can
be seen, or when nobody has written it for a minute. Work that must not be done twice is guarded by conditional writes;
a lease saves work, cleans up after the dead, and refuses in plain words what could only go wrong.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from stages.errors import UserError
from stages.files import Place

BEAT, PATIENCE = 10.0, 60.0  # seconds


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, as its file says."""

    token: str
    host: str
    machine: str  # tells machines and containers of one name apart, and one boot from the next
    pid: int
    started: float  # of the process, Unix time
    command: str
    beat: float  # last sign of life, Unix time

    @classmethod
    def here(cls, command: str = "") -> Holder:
        """This process, with a token of its own."""
        pid = os.getpid()
        started = psutil.Process(pid).create_time()
        return cls(uuid.uuid4().hex[:12], platform.node(), _machine(), pid, started, command or shlex.join(sys.argv), time.time())

    @property
    def lives(self) -> bool:
        """Whether it still works, as far as can be seen from here."""
        if self.machine == _machine():
            try:
                return abs(psutil.Process(self.pid).create_time() - self.started) < 2
            except psutil.Error:
                return False
        return time.time() - self.beat < PATIENCE

    def to_json(self) -> bytes:
        """As it lies in the file."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


class Lease:
    """One that this process holds; made by `lease`."""

    def __init__(self, place: Place, holder: Holder) -> None:
        self.place, self.holder = place, holder
        self._end = threading.Event()
        self._lost_to: Holder | None = None
        self._thread = threading.Thread(target=self._beat, daemon=True, name=f"lease {place.name}")
        self._thread.start()

    def check(self) -> None:
        """Raise UserError if somebody else took it over."""
        if self._lost_to is not None:
            raise UserError(f"another process took over here: {_who(self._lost_to)}; this one stops")

    def release(self) -> None:
        """Give it back. Whoever took it over keeps it."""
        self._end.set()
        self._thread.join()
        with suppress(OSError):
            there = read_holder(self.place)
            if there is not None and there.token == self.holder.token:
                self.place.remove()

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            with suppress(OSError):  # storage hiccups; after a minute of them others may think this process dead
                there = read_holder(self.place)
                if there is not None and there.token != self.holder.token:
                    self._lost_to = there
                    return
                self.place.write(replace(self.holder, beat=time.time()).to_json())


@contextmanager
def lease(place: Place, what: str, take_over: str = "", command: str = "") -> Iterator[Lease]:
    """Hold the lease at `place` during the block; a stale one is taken over.

    Args:
        what: what it guards, in words: "the run of vae in outputs/runs/vae".
        take_over: what to do to go on all the same: "give --fresh"; the message says it.
        command: what the file says of this process; its command line by default.

    Raises:
        UserError: a living process holds it; the message names its host, pid and command.
    """
    holder = Holder.here(command)
    while not place.create(holder.to_json()):
        there = read_holder(place)
        if there is not None and there.lives:
            cure = take_over or f"stop it there (`kill {there.pid}`), or, if it is dead, wait {PATIENCE:.0f} s or remove {place}"
            raise UserError(f"{what} is in use by {_who(there)}; {cure}")
        place.remove()
    held = Lease(place, holder)
    try:
        yield held
    finally:
        held.release()


def read_holder(place: Place) -> Holder | None:
    """Who holds the lease at `place`, alive or not; None for nobody, and for a file that is no lease."""
    try:
        return Holder(**json.loads(place.read()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _who(holder: Holder) -> str:
    return f"process {holder.pid} on {holder.host} ({holder.command}; last seen {max(0, time.time() - holder.beat):.0f} s ago)"


def _machine() -> str:
    """Names this boot of this machine, and on Linux this space of process numbers: a pid means something only within."""
    parts = [platform.node()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)
