"""What of a store nothing refers to any more: drafts of dead jobs, objects and files that no row or part names, old series."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipelines.features.jobs import ABANDONED, CLAIMS, NOBODY, living
from pipelines.features.ledger import INDEX, editions, read_journal
from pipelines.features.shards import DRAFT
from pipelines.features.store import FeatureStore
from stages.files import Place

Recipe = Mapping[str, Any]


@dataclass(frozen=True)
class Leftover:
    """Something that takes space."""

    place: Place
    kind: str
    why: str
    num_bytes: int
    keep: str = ""  # why it is kept all the same; "" for what nothing refers to

    folder: bool = False

    def remove(self) -> None:
        """Remove the file, or the folder with all it holds."""
        if self.folder:
            self.place.remove_tree()
        else:
            self.place.remove()


def store_leftovers(store: FeatureStore, old: Callable[[str, Recipe], str], busy: str = "") -> list[Leftover]:
    """What of a store nothing refers to. While a job works on it everything is kept.

    Args:
        busy: says who else reads the store now, "" for nobody: then everything is kept, too.
        old: says why nobody needs a series of this name and recipe, "" for one that is needed.
    """
    jobs = living(store.place)
    keep = f"{len(jobs)} living job{'s' if len(jobs) > 1 else ''} at work on the store" if jobs else busy
    found: list[Leftover] = []
    for series, recipe in store.recipes().items():
        folder = store.series_folder(series)
        if why := old(series, recipe):
            found.append(Leftover(folder, "old series", why, sum(folder.tree().values()), keep, folder=True))
        else:
            found += _in_series(folder, jobs, keep)
    return found + list(_unnamed_tables(store, keep))


def _in_series(folder: Place, jobs: set[str], keep: str) -> Iterator[Leftover]:
    files = folder.list()  # before the rows are read: an object is there before its row
    named = {row.object for row in read_journal(folder).values()}
    newest = editions(folder)
    for edition in newest.values():
        named.update(edition.table["object"].to_pylist())
    for name, size in sorted(files.items()):
        _, draft, rest = name.partition(DRAFT)
        job = rest.partition("-")[0]
        young = "written within the hour" if (job == NOBODY or not draft) and _age(folder / name) < ABANDONED else ""
        if draft and job not in jobs:
            yield Leftover(folder / name, "stale draft", "its job is gone", size, keep or young)
        elif name.endswith(".tar") and not draft and name not in named:
            yield Leftover(folder / name, "orphan shard", "no ledger row names it", size, keep or young)
    groups: dict[str, list[str]] = defaultdict(list)
    index = (folder / INDEX).list()
    for name in sorted(index):
        groups[name.partition(".")[0]].append(name)
    for names in groups.values():
        for name in names[:-1]:
            yield Leftover(folder / INDEX / name, "old index", "a newer edition is there", index[name], keep)
    for name, size in (folder / CLAIMS).list().items():
        with suppress(FileNotFoundError):
            if (folder / CLAIMS / name).read().decode(errors="replace") not in jobs:
                yield Leftover(folder / CLAIMS / name, "stale claim", "its job is gone", size, keep)


def _unnamed_tables(store: FeatureStore, keep: str) -> Iterator[Leftover]:
    """Files of interrupted ingests."""
    named = {name for part in store.parts for name in (*(f.name for f in part.files), part.rejected, part.withdrawn)}
    for folder in ("clips", "rejected", "withdrawn"):
        for name, size in sorted((store.place / folder).list().items()):
            if f"{folder}/{name}" not in named:
                place = store.place / folder / name
                young = "written within the hour" if _age(place) < ABANDONED else ""
                yield Leftover(place, "orphan table", "no part of the store names it", size, keep or young)


def _age(place: Place) -> float:
    """Seconds since a local file was written. Objects of a remote store are taken for old: their upload is one step."""
    if not place.local:
        return ABANDONED
    with suppress(OSError):
        return time.time() - os.stat(place.path).st_mtime
    return 0.0
