"""What the readers list, on its way to becoming clips: listed, chosen, with what is known of the files, and without twins.

Records pass from file to file (`spool`): what is in memory is some tens of bytes of each.
"""

from __future__ import annotations

import fnmatch
import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from options import Reservation, WorkerRange
from pipelines import corpora
from pipelines.corpora.headers import Headers, probe_headers
from pipelines.corpora.records import Record, Recording
from pipelines.corpora.spool import BATCH, Spool, View, at
from pipelines.corpora.twins import changed_by_twins


@dataclass
class Source:
    """A corpus in its folder, and what its reader lists."""

    corpus: str
    root: Path
    records: Spool | View
    listed: str  # how many recordings, and a digest of all that is listed
    filtered: Counter[str] = field(default_factory=Counter)


def list_sources(
    folders: Sequence[Path], include: Sequence[str], keep_blacklisted: bool, follow_links: bool, spools: Path
) -> tuple[list[Source], list[str]]:
    """What the readers find in the folders, and a sentence on each corpus that is read only when `include` names it."""
    roots, left_out = corpora.wanted(folders, include, follow_links)
    listings = ((name, root, corpora.read(name, root, keep_blacklisted, follow_links)) for name, root in roots)
    return [_spooled(*listing, spools / f"{number}-listed") for number, listing in enumerate(listings)], left_out


def _spooled(corpus: str, root: Path, records: Iterable[Record], path: Path) -> Source:
    digest = hashlib.sha256()

    def passing() -> Iterator[Record]:
        for record in records:
            digest.update(repr(record).encode())
            yield record

    spool = Spool(path, passing())
    return Source(corpus, root, spool, f"{spool.recordings} recordings, {digest.hexdigest()[:16]}")


def choose(
    source: Source, path: Path, licences: Sequence[str] = (), limit: int | None = None, known: Callable[[Recording], bool] | None = None
) -> None:
    """Leave out what options exclude and what is known already, and count it. The rest is written to `path`."""
    if not licences and limit is None and known is None:
        return
    patterns = [pattern.casefold() for pattern in licences] or ["*"]

    def fits(recording: Recording) -> bool:
        return any(fnmatch.fnmatchcase(recording.licence.casefold(), pattern) for pattern in patterns)

    candidates = (r.recording_id for r in source.records if isinstance(r, Recording) and fits(r))
    chosen = None if limit is None else _chosen(candidates, limit)

    def kept() -> Iterator[Record]:
        for record in source.records:
            if not isinstance(record, Recording):
                yield record
            elif not fits(record):
                source.filtered["other licence"] += 1
            elif chosen is not None and record.recording_id not in chosen:
                source.filtered["over the limit"] += 1
            elif known is not None and known(record):
                source.filtered["in the store already"] += 1
            else:
                yield record

    source.records = Spool(path, kept())


def _chosen(ids: Iterable[str], limit: int) -> set[str]:
    """The `limit` ids whose hashes are smallest."""
    smallest: dict[bytes, str] = {}
    for one in ids:
        smallest[hashlib.sha256(one.encode()).digest()] = one
        if len(smallest) > 2 * limit + BATCH:
            smallest = dict(heapq.nsmallest(limit, smallest.items()))
    return {one for _, one in heapq.nsmallest(limit, smallest.items())}


def headers_of(sources: Sequence[Source], workers: WorkerRange, reserve: Reservation, begins: Callable[[int], None]) -> Headers:
    """What is known of every file; `begins` is told how many there are."""

    def paths() -> Iterator[str]:
        return (record.path for source in sources for record in source.records if isinstance(record, Recording))

    hashes = np.fromiter(map(hash, paths()), np.int64)
    first = np.sort(np.unique(hashes, return_index=True)[1])
    begins(len(first))
    return Headers(probe_headers(at(first, paths()), len(first), workers, reserve))


def reject_twins(sources: Sequence[Source], headers: Headers) -> None:
    """Give every recording its content, and reject twins across all sources."""

    def with_content(records: Iterable[Record]) -> Iterator[Record]:
        return (replace(r, content=headers[r.path].content) if isinstance(r, Recording) else r for r in records)

    for source in sources:
        source.records = View(source.records, with_content)
    every = [source.records for source in sources]
    changed = changed_by_twins(
        lambda: (r for records in every for r in records if isinstance(r, Recording)), lambda path: headers[path].seconds
    )
    first = 0
    for source in sources:
        source.records, first = View(source.records, partial(_changed, changed, first)), first + source.records.recordings


def _changed(changed: Mapping[int, Record], first: int, records: Iterable[Record]) -> Iterator[Record]:
    """The records with what becomes of them, by the place of a recording among those of all sources."""
    for record in records:
        if isinstance(record, Recording):
            yield changed.get(first, record)
            first += 1
        else:
            yield record
