"""What becomes of a clip: four verdicts, since what the world did to a clip must not look like what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from pipelines.features.shards import Member


@dataclass(frozen=True)
class Kept:
    """The members of a clip, by series and then by suffix ("mel.npy"), with numbers measured on the way."""

    members: Mapping[str, Mapping[str, Member]]
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """The content is bad, for good: the ledger says so, and no later run tries again unless it is asked to."""

    reason: str


@dataclass(frozen=True)
class Filtered:
    """An option leaves the clip out, as the series' recipe says; the ledger names it beside what is rejected."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """Storage, memory or a mount failed, not the content: the clip's shard is not made, and tried again."""

    reason: str


Outcome = Kept | Rejected | Filtered | Failed


def is_failure(error: BaseException) -> bool:
    """Whether an error is the world's and may be gone on another try: storage, permission, memory of host or GPU."""
    out_of_memory = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's, on a CPU
    return isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError)) or out_of_memory


def describe(error: BaseException) -> str:
    """An error in one line, with the file that it is about."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {error}".splitlines()[0]
