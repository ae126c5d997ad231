"""Several jobs on one store: whose drafts are whose, who is at which shard, and what the dead left.

A job has a lease in `jobs/<job>.json` of the store, and for the shard in hand a claim, `mel/claims/000012`, that holds its
name. Both only save work: that a shard is made once is decided by its ledger row.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pipelines.features.shards import DRAFT
from pipelines.leases import read_holder
from stages.files import Place

NOBODY = "none"  # the job of a store that was opened without `working`: it claims nothing
ABANDONED = 3600.0  # seconds after which nobody's draft is removed
JOBS, CLAIMS = "jobs", "claims"


def lease_of(store: Place, job: str) -> Place:
    """Where the lease of a job lies."""
    return store / JOBS / f"{job}.json"


def lives(store: Place, job: str) -> bool:
    """Whether a job still works."""
    holder = read_holder(lease_of(store, job)) if re.fullmatch(r"[0-9a-f]+", job) else None
    return holder is not None and holder.lives


def living(store: Place) -> set[str]:
    """The jobs that work on a store."""
    return {job for name in (store / JOBS).list() if lives(store, job := name.removesuffix(".json"))}


@contextmanager
def claim(store: Place, folder: Place, shard: int, job: str) -> Iterator[bool]:
    """Claim a shard of the series in `folder` during the block; yields False, and claims nothing, where a living job did."""
    if job == NOBODY:
        yield True
        return
    place = folder / CLAIMS / f"{shard:06d}"
    if not place.create(job.encode()):
        owner = _read(place)
        if owner != job and lives(store, owner):
            yield False
            return
        place.write(job.encode())
    try:
        yield True
    finally:
        if _read(place) == job:
            place.remove()


def tidy(store: Place, folder: Place) -> None:
    """Remove drafts and claims of jobs that are gone from the series in `folder`, and their leases."""
    alive = living(store)
    for name in (store / JOBS).list():
        if name.removesuffix(".json") not in alive and not lives(store, name.removesuffix(".json")):
            (store / JOBS / name).remove()
    for name in folder.list():
        _, draft, rest = name.partition(DRAFT)
        job = rest.partition("-")[0]
        if draft and job not in alive and (job != NOBODY or _age(folder / name) > ABANDONED):
            (folder / name).remove()
    for name in (folder / CLAIMS).list():
        if _read(folder / CLAIMS / name) not in alive:
            (folder / CLAIMS / name).remove()


def _read(place: Place) -> str:
    try:
        return place.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _age(place: Place) -> float:
    """Seconds since a local file was written; drafts are local."""
    with suppress(OSError):
        return time.time() - os.stat(place.path).st_mtime
    return 0.0
