"""What exists of a series: ledger rows in a journal, compacted into an index of Arrow files.

    mel/000012-0123456789ab.tar    a shard's object, named by its content
    mel/journal/000012.json        its ledger row: made by the one conditional write that lets the shard exist
    mel/index/000000.000003.arrow  the rows of 1,000 shards, third edition; mapped into memory, one row per shard

A row is in the journal until an edition of the index holds it. Readers list the journal before the index, so
whatever order a compaction is killed in, a row is seen at least once. Editions are numbered and made by conditional
writes, so of two compactions at once one starts again and no row is lost.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from stages.files import Place

SHARDS_PER_FILE = 1000
THREADS = 16  # reading small files: waiting, not computing
JOURNAL, INDEX = "journal", "index"

ROW_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("object", pa.string()),
        ("num_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("members", pa.list_(pa.string())),
        ("clips", pa.list_(pa.uint32())),
        ("spans", pa.list_(pa.int64())),
        ("checksums", pa.list_(pa.uint32())),
        ("rejected", pa.list_(pa.struct([("clip_id", pa.string()), ("reason", pa.string())]))),
    ]
)
_OBJECT = re.compile(r"(\d{6,})-[0-9a-f]{12}\.tar")
_EDITION = re.compile(r"(\d{6})\.(\d{6})\.arrow")


class StoreWarning(UserWarning):
    """A shard that exists but cannot be trusted; the next run of its pass makes it again."""


@dataclass(frozen=True)
class Rejection:
    """A clip that a pass could not use."""

    clip_id: str
    reason: str


@dataclass(frozen=True)
class LedgerRow:
    """What makes a shard exist."""

    shard: int
    object: str  # name of the tar
    num_bytes: int
    sha256: str
    members: tuple[str, ...]  # suffixes, such as "mel.npy"
    clips: tuple[int, ...]  # numbers, ascending
    spans: tuple[int, ...]  # clip by clip: offset and size of each member in the tar
    checksums: tuple[int, ...]  # per clip: crc32 of its members
    rejected: tuple[Rejection, ...] = ()

    @property
    def count(self) -> int:
        """Clips that the shard holds."""
        return len(self.clips)

    def to_json(self) -> bytes:
        """The row as it lies in the journal."""
        return (json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":")) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> LedgerRow:
        """Inverse of `to_json`; raises ValueError for anything that is no ledger row."""
        try:
            return cls.from_values(json.loads(data))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a ledger row: {error!r}") from error

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> LedgerRow:
        """The row of a dict, as JSON or the index gives it. Raises ValueError for one that contradicts itself."""
        row = cls(
            shard=int(values["shard"]),
            object=str(values["object"]),
            num_bytes=int(values["num_bytes"]),
            sha256=str(values["sha256"]),
            members=tuple(values["members"]),
            clips=tuple(map(int, values["clips"])),
            spans=tuple(map(int, values["spans"])),
            checksums=tuple(map(int, values["checksums"])),
            rejected=tuple(Rejection(**entry) for entry in values["rejected"]),
        )
        name = _OBJECT.fullmatch(row.object)
        if name is None or int(name[1]) != row.shard:
            raise ValueError(f"{row.object!r} is no object of shard {row.shard}")
        if not len(row.clips) == len(row.checksums) or len(row.spans) != 2 * len(row.members) * len(row.clips):
            raise ValueError(f"the row has {len(row.clips)} clips, {len(row.checksums)} checksums and {len(row.spans)} offsets")
        return row


class Span:
    """Where a clip lies: the object of its shard, the members with offset and size, the checksum. Made in passing, never kept."""

    __slots__ = ("checksum", "num_bytes", "object", "offsets")

    def __init__(self, name: str, num_bytes: int, offsets: list[int], checksum: int) -> None:
        self.object, self.num_bytes, self.offsets, self.checksum = name, num_bytes, offsets, checksum


class Ledger(Mapping[int, LedgerRow]):
    """The shards of a series that exist, by number. Rows are made when asked for; clips are looked up without making any.

    Pickles as the folder, and is read again where it is unpickled.
    """

    def __init__(self, folder: Place, repair: str, shards: Sequence[int] | None = None, check: bool = True) -> None:
        """Read what there is.

        Args:
            repair: the command that a warning names.
            shards: only these few: then nothing is listed that grows with the series.
            check: a shard whose object is gone or of another size counts as missing, with a warning.
        """
        self.folder, self.repair, self._shards, self._check = folder, repair, shards, check
        journal = read_journal(folder, repair, shards)
        groups = None if shards is None else {shard // SHARDS_PER_FILE for shard in shards}
        self._tables = [edition.table for edition in editions(folder, groups).values() if edition.table.num_rows]
        if journal:
            self._tables.append(_table(journal.values()))
        self._where = self._existing()
        self._columns = [_Columns(table) for table in self._tables]

    def __reduce__(self) -> Any:
        return Ledger, (self.folder, self.repair, self._shards, self._check)

    def _existing(self) -> dict[int, tuple[int, int]]:
        """(table, row) of every shard whose object lies there. Rows of the index come first, the journal's may replace bad ones."""
        where: dict[int, tuple[int, int]] = {}
        bad: dict[int, str] = {}
        sizes = self.folder.list() if self._shards is None and self._check else {}
        for number, table in enumerate(self._tables):
            columns = zip(*(table[name].to_pylist() for name in ("shard", "object", "num_bytes")), strict=True)
            for row, (shard, name, num_bytes) in enumerate(columns):
                if shard in where or (self._shards is not None and shard not in self._shards):
                    continue
                if self._shards is not None and self._check:
                    with suppress(FileNotFoundError):
                        sizes[name] = (self.folder / name).size()
                if not self._check or sizes.get(name) == num_bytes:
                    where[shard] = number, row
                    bad.pop(shard, None)
                else:
                    there = f"has {sizes[name]} bytes where its ledger says {num_bytes}" if name in sizes else "is missing"
                    bad[shard] = f"{self.folder / name} {there}"
        for problem in bad.values():
            warn(problem, self.repair)
        return dict(sorted(where.items()))

    def __getitem__(self, shard: int) -> LedgerRow:
        table, row = self._where[shard]
        return LedgerRow.from_values(self._tables[table].slice(row, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[int]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, shard: object) -> bool:
        return shard in self._where

    @property
    def members(self) -> tuple[str, ...]:
        """Suffixes of the members of every clip; none as long as there is no clip."""
        for table, row in self._where.values():
            if members := self._tables[table]["members"][row].as_py():
                return tuple(members)
        return ()

    def mark(self, mask: np.ndarray, shards: Iterable[int]) -> None:
        """Set `mask` [clips] for the clips that these shards hold."""
        rows: dict[int, list[int]] = defaultdict(list)
        for shard in shards:
            table, row = self._where[shard]
            rows[table].append(row)
        for table, wanted in rows.items():
            self._columns[table].mark(mask, wanted)

    def find(self, shard: int, clip: int) -> Span:
        """Where a clip lies. Raises KeyError for one that the shard does not hold."""
        table, row = self._where[shard]
        return self._columns[table].find(row, clip)


class _Columns:
    """The columns of a table of rows as arrays, without a copy."""

    def __init__(self, table: pa.Table) -> None:
        (batch,) = table.combine_chunks().to_batches() or [None]
        self.batch = batch
        lists = {name: batch.column(name) for name in ("members", "clips", "spans", "checksums")}
        self.offsets = {name: column.offsets.to_numpy() for name, column in lists.items()}
        self.values = {name: lists[name].values.to_numpy() for name in ("clips", "spans", "checksums")}

    def mark(self, mask: np.ndarray, rows: Sequence[int]) -> None:
        offsets, clips = self.offsets["clips"], self.values["clips"]
        if len(rows) == len(self.batch):
            mask[clips[offsets[0] : offsets[-1]]] = True
            return
        for row in rows:
            mask[clips[offsets[row] : offsets[row + 1]]] = True

    def find(self, row: int, clip: int) -> Span:
        first, end = self.offsets["clips"][row : row + 2].tolist()
        place = first + int(np.searchsorted(self.values["clips"][first:end], clip))
        if place == end or int(self.values["clips"][place]) != clip:
            raise KeyError(clip)
        width = 2 * int(self.offsets["members"][row + 1] - self.offsets["members"][row])
        start = int(self.offsets["spans"][row]) + width * (place - first)
        return Span(
            self.batch.column("object")[row].as_py(),
            self.batch.column("num_bytes")[row].as_py(),
            self.values["spans"][start : start + width].tolist(),
            int(self.values["checksums"][place]),
        )


# ----------------------------------------------------------------------------------------------------------- journal


def journal_name(shard: int) -> str:
    """Name of a shard's row in its series."""
    return f"{JOURNAL}/{shard:06d}.json"


def journal_names(folder: Place) -> dict[int, str]:
    """The files that wait for compaction, by shard."""
    return {int(name.removesuffix(".json")): name for name in sorted((folder / JOURNAL).list()) if re.fullmatch(r"\d{6,}\.json", name)}


def read_journal(folder: Place, repair: str = "", shards: Sequence[int] | None = None) -> dict[int, LedgerRow]:
    """The rows that wait for compaction, or those of `shards`. Damaged ones are left out, with a warning that names `repair`."""
    names = list(journal_names(folder).values()) if shards is None else [f"{shard:06d}.json" for shard in shards]

    def row(name: str) -> LedgerRow | None:
        try:
            return LedgerRow.from_json((folder / JOURNAL / name).read())
        except FileNotFoundError:
            return None  # compacted since: the index, which is read after, has it
        except ValueError as error:
            warn(f"{folder / JOURNAL / name} is damaged ({error})", repair)
            return None

    with ThreadPoolExecutor(THREADS) as threads:
        return {found.shard: found for found in threads.map(row, names) if found is not None}


def warn(what: str, repair: str) -> None:
    """Say that a shard counts as missing, and what makes it again."""
    warnings.warn(f"{what}; it counts as missing, `{repair}` makes it again", StoreWarning, stacklevel=3)


# ------------------------------------------------------------------------------------------------------------- index


@dataclass(frozen=True)
class Edition:
    """The newest index file of a thousand shards."""

    number: int
    table: pa.Table


def editions(folder: Place, groups: Collection[int] | None = None) -> dict[int, Edition]:
    """The newest edition of every group of shards, or of these groups, mapped into memory."""
    while True:
        newest: dict[int, int] = {}
        for name in (folder / INDEX).list():
            match = _EDITION.fullmatch(name)
            if match and (groups is None or int(match[1]) in groups):
                group, number = int(match[1]), int(match[2])
                newest[group] = max(number, newest.get(group, 0))
        try:
            return {group: Edition(number, _mapped(folder, group, number)) for group, number in sorted(newest.items())}
        except FileNotFoundError:
            continue  # a newer edition came, and this one went


def _mapped(folder: Place, group: int, number: int) -> pa.Table:
    place = folder / INDEX / _edition_name(group, number)
    return pa.ipc.open_file(pa.memory_map(str(place.local_copy()))).read_all()


def _edition_name(group: int, number: int) -> str:
    return f"{group:06d}.{number:06d}.arrow"


def compact(folder: Place, drop: Mapping[int, str] | None = None) -> None:
    """Fold the journal of a series into its index, and take the rows of `drop` (shard → object) out of both.

    May be killed anywhere and run by several at once: a journal row is removed only after an edition that holds it is the newest.
    """
    drop = dict(drop or {})
    while groups := _waiting(folder, drop):
        for group, rows in groups.items():
            if _publish(folder, group, rows, drop):
                for shard in {*rows, *(s for s in drop if s // SHARDS_PER_FILE == group)}:
                    _forget(folder, shard, rows.get(shard), drop)
                    drop.pop(shard, None)
    names = [name for name in (folder / INDEX).list() if _EDITION.fullmatch(name)]
    for name in names:  # what a compaction that was killed left
        if any(other > name and other[:7] == name[:7] for other in names):
            (folder / INDEX / name).remove()


def _waiting(folder: Place, drop: Mapping[int, str]) -> dict[int, dict[int, LedgerRow]]:
    """Journal rows by group; groups that only lose rows have none."""
    groups: dict[int, dict[int, LedgerRow]] = {shard // SHARDS_PER_FILE: {} for shard in drop}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)  # damaged rows wait for their pass
        for shard, row in read_journal(folder).items():
            groups.setdefault(shard // SHARDS_PER_FILE, {})[shard] = row
    return groups


def _publish(folder: Place, group: int, rows: Mapping[int, LedgerRow], drop: Mapping[int, str]) -> bool:
    """Make the next edition of a group. False when somebody else made it first, or one after it."""
    before = editions(folder, [group]).get(group)
    sizes = folder.list()
    merged: dict[int, LedgerRow] = {}
    known = [LedgerRow.from_values(values) for values in before.table.to_pylist()] if before else []
    for row in [*known, *rows.values()]:
        if drop.get(row.shard) == row.object:
            continue
        if row.shard not in merged or sizes.get(merged[row.shard].object) != merged[row.shard].num_bytes:
            merged[row.shard] = row
    number = (before.number if before else 0) + 1
    data = io.BytesIO()
    with pa.ipc.new_file(data, ROW_SCHEMA) as writer:
        writer.write_table(_table(merged[shard] for shard in sorted(merged)))
    if not (folder / INDEX / _edition_name(group, number)).create(data.getvalue()):
        return False
    there = {int(match[2]) for name in (folder / INDEX).list() if (match := _EDITION.fullmatch(name)) and int(match[1]) == group}
    # Made from an edition that was replaced meanwhile: it does not count. A listing beside other writers may even miss both.
    if max(there, default=0) != number:
        (folder / INDEX / _edition_name(group, number)).remove()
        return False
    for old in there - {number}:
        (folder / INDEX / _edition_name(group, old)).remove()
    return True


def _forget(folder: Place, shard: int, row: LedgerRow | None, drop: Mapping[int, str]) -> None:
    """Remove a journal row that the index holds now, or that was dropped; not one that took its place meanwhile."""
    place = folder / journal_name(shard)
    if row is None and shard not in drop:
        return
    try:
        there = LedgerRow.from_json(place.read())
    except (FileNotFoundError, ValueError):
        return
    if there == row or drop.get(shard) == there.object:
        place.remove()


def _table(rows: Iterable[LedgerRow]) -> pa.Table:
    return pa.Table.from_pylist([asdict(row) for row in rows], ROW_SCHEMA).combine_chunks()
