"""The clip table: Arrow files of some thousand shards each, mapped into memory. Nothing here holds an object per clip.

Every ingest adds a *part*: clips of its own, dealt to shards of its own behind those that exist. A clip has a number, its
place in shard order over all parts; numbers, shards and files never change again. What a later part holds out for
validation or test leaves the training of all parts: the split is a mask over the table.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.files import Place, digest

SHARDS_PER_FILE = 1000
SHARDS_PER_BATCH = 64  # of a file: what one look-up maps
WITHHELD = "withheld"  # the split of a training clip whose recording was held out, in this corpus or another, at any time

CLIP_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),  # unique, without dots and slashes: it names tar members
        ("corpus", pa.string()),
        ("path", pa.string()),  # the recording: an absolute path or a URL
        ("start", pa.float64()),  # seconds
        ("seconds", pa.float64()),
        ("captions", pa.list_(pa.string())),
        ("transcript", pa.string()),  # "" when there is none
        ("labels", pa.list_(pa.string())),
        ("split", pa.string()),  # train, validation or test
        ("licence", pa.string()),
        ("origin", pa.string()),  # where the sound comes from, "youtube:<id>"; "" when unknown
        ("content", pa.string()),  # hash of the recording; "" when unknown
        ("recording", pa.string()),  # its id in the corpus; "" when unknown
    ]
)
_MAY_LACK = ("origin", "content", "recording")
REJECTED_SCHEMA = pa.schema([(name, pa.string()) for name in ("corpus", "path", "clip_id", "reason")])
_REPEATED = ("corpus", "split", "licence")  # few values: stored as dictionaries, so that masks look at bytes
TEXTS = ("captions", "labels", "transcript")  # bits of the column `texts`, the lowest first


@dataclass(frozen=True)
class TableFile:
    """One file of the clip table."""

    name: str
    clips: int


@dataclass(frozen=True)
class Part:
    """What one ingest added to a store."""

    number: int
    first_clip: int
    clips: int
    first_shard: int
    shards: int
    files: tuple[TableFile, ...]
    rejected: str  # name of the table of what was left out
    withdrawn: str  # name of the list of clips, of this part and earlier ones, that leave training; "" for none
    report: dict[str, Any] = field(default_factory=dict)  # of the job that made it

    def to_json(self) -> bytes:
        """As it lies in the store."""
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Part:
        """Inverse of `to_json`. Raises ValueError for anything else."""
        try:
            values = json.loads(data)
            return cls(**values | {"files": tuple(TableFile(**file) for file in values["files"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a part of a store: {error!r}") from error


class ClipTable:
    """The clips of a store by number. Pickles without its data; files are mapped when first needed, remote ones from a local copy."""

    def __init__(self, root: Place, parts: Sequence[Part], shard_size: int) -> None:
        self.root, self.parts, self.shard_size = root, tuple(parts), shard_size
        self._files = [file for part in self.parts for file in part.files]
        self._file_starts = np.cumsum([0, *(file.clips for file in self._files)])
        self._mapped: dict[int, Any] = {}  # opened files by number
        self._batches: dict[int, pa.RecordBatch] = {}  # by first clip
        self._codes: dict[str, tuple[np.ndarray, list[str]]] = {}

    def __len__(self) -> int:
        return sum(part.clips for part in self.parts)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "parts": self.parts, "shard_size": self.shard_size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def num_shards(self) -> int:
        """Shards of every complete series."""
        return sum(part.shards for part in self.parts)

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """The first clip of every shard, and the number of clips behind them: [shards + 1] int64."""
        starts = [part.first_clip + np.arange(part.shards, dtype=np.int64) * self.shard_size for part in self.parts]
        return np.concatenate([*starts, [len(self)]])

    def shard_of(self, clip: int) -> int:
        """The shard that holds a clip."""
        return int(np.searchsorted(self.shard_starts, clip, "right")) - 1

    @cached_property
    def withdrawn(self) -> np.ndarray:
        """Clips that left training for a held-out twin, ascending."""
        lists = [np.load(io.BytesIO((self.root / part.withdrawn).read()), allow_pickle=False) for part in self.parts if part.withdrawn]
        return np.unique(np.concatenate(lists)) if lists else np.empty(0, np.int64)

    # ------------------------------------------------------------------------------------------------------- rows

    def _local(self, file: int) -> str:
        return str((self.root / self._files[file].name).local_copy())

    def _batch(self, clip: int) -> tuple[int, pa.RecordBatch]:
        """The batch that holds a clip, mapped, and its first clip. Only what is looked at comes into memory."""
        file = int(np.searchsorted(self._file_starts, clip, "right")) - 1
        place, size = clip - int(self._file_starts[file]), self.shard_size * SHARDS_PER_BATCH
        start = clip - place % size
        if start not in self._batches:
            if file not in self._mapped:
                self._mapped[file] = pa.ipc.open_file(pa.memory_map(self._local(file)))
            self._batches[start] = self._mapped[file].get_batch(place // size)
        return start, self._batches[start]

    def _all_batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        clip = 0
        while clip < len(self):
            start, batch = self._batch(clip)
            yield start, batch
            clip = start + len(batch)

    def columns(self, names: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """Some columns of all clips, file by file with its first clip. A file is unmapped after its turn, so nothing stays in memory."""
        for file, start in enumerate(self._file_starts[:-1].tolist()):
            yield start, pa.ipc.open_file(pa.memory_map(self._local(file))).read_all().select(list(names))

    def table(self) -> pa.Table:
        """All rows as they were ingested, mapped; `split` without regard to what was withdrawn since."""
        return pa.Table.from_batches(batch for _, batch in self._all_batches())

    def rows(self, first: int, end: int) -> list[dict[str, Any]]:
        """The clips `first` … `end` - 1 as dicts, with their `number` and the split that holds now."""
        rows: list[dict[str, Any]] = []
        while first < end:
            start, batch = self._batch(first)
            taken = batch.slice(first - start, end - first).to_pylist()
            rows += [self._as_now(row, first + i) for i, row in enumerate(taken)]
            first += len(taken)
        return rows

    def row(self, clip: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """One clip, or some columns of it."""
        start, batch = self._batch(clip)
        return self._as_now({name: batch.column(name)[clip - start].as_py() for name in columns or batch.schema.names}, clip)

    def take(self, clips: np.ndarray, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of ascending `clips` like those of `rows`, some thousand in memory at a time."""
        done = 0
        while done < len(clips):
            start, batch = self._batch(int(clips[done]))
            end = int(np.searchsorted(clips, start + len(batch)))
            wanted = batch.select(list(columns)) if columns else batch
            taken = wanted.take(pa.array(clips[done:end] - start)).to_pylist()
            yield from map(self._as_now, taken, clips[done:end].tolist())
            done = end

    def ids(self, clips: np.ndarray) -> list[str]:
        """The ids of ascending `clips`."""
        return [row["clip_id"] for row in self.take(clips, ["clip_id"])]

    def numbers(self, ids: Collection[str] | pa.ChunkedArray) -> dict[str, int]:
        """The numbers of those `ids` that the table has, by looking through all of it."""
        wanted: Any = ids if isinstance(ids, pa.ChunkedArray) else pa.array(ids, pa.string())
        numbers: dict[str, int] = {}
        for start, table in self.columns(["clip_id"]):
            column = table["clip_id"]
            for i in np.flatnonzero(pc.is_in(column, value_set=wanted).to_numpy()).tolist():
                numbers[column[i].as_py()] = start + i
        return numbers

    def recordings(self, corpus: str, column: str) -> Iterator[str]:
        """The `recording` or `path` of all clips of a corpus, file by file; those of a file once each."""
        for _, table in self.columns(["corpus", column]):
            yield from pc.unique(table.filter(pc.equal(pc.cast(table["corpus"], pa.string()), corpus))[column]).to_pylist()

    def _as_now(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        row["number"] = number
        if row.get("split") == "train":
            i = int(np.searchsorted(self.withdrawn, number))
            if i < len(self.withdrawn) and int(self.withdrawn[i]) == number:
                row["split"] = WITHHELD
        return row

    # ------------------------------------------------------------------------------------------------------ masks

    def among(self, column: str, values: Collection[str]) -> np.ndarray:
        """Which clips have one of `values` in `corpus`, `split` or `licence`: [clips] bool. Withdrawn ones are in the split `WITHHELD`."""
        codes, names = self._coded(column)
        mask: np.ndarray = np.array([name in values for name in names], bool)[codes]
        if column == "split":
            mask[self.withdrawn] = WITHHELD in values
        return mask

    def values(self, column: str) -> list[str]:
        """The values that occur in `corpus`, `split` or `licence`, sorted."""
        return sorted(self._coded(column)[1])

    def with_texts(self, kinds: Collection[str]) -> np.ndarray:
        """Which clips have at least one of `kinds` (captions, labels, transcript): [clips] bool; all of them for no kinds."""
        if not kinds:
            return np.ones(len(self), bool)
        bits = np.uint8(sum(1 << TEXTS.index(kind) for kind in kinds))
        return (self._text_bits & bits) > 0

    @cached_property
    def _text_bits(self) -> np.ndarray:
        parts = [table["texts"].to_numpy().copy() for _, table in self.columns(["texts"])]
        return np.concatenate([np.empty(0, np.uint8), *parts])

    def _coded(self, column: str) -> tuple[np.ndarray, list[str]]:
        """A column of few values: for every clip the number of its value, and the values."""
        if column not in self._codes:
            names: dict[str, int] = {}
            parts = [np.empty(0, np.int32)]
            for _, table in self.columns([column]):
                for chunk in table[column].chunks:
                    codes = np.array([names.setdefault(name, len(names)) for name in chunk.dictionary.to_pylist()], np.int32)
                    parts.append(codes[chunk.indices.to_numpy(zero_copy_only=False)])
            self._codes[column] = np.concatenate(parts), list(names)
        return self._codes[column]


# ------------------------------------------------------------------------------------------------------- making one


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of `schema`. Raises ValueError for those that must be there and are not."""
    missing = [name for name in schema.names if name not in table.column_names]
    if unknown := [name for name in missing if name not in _MAY_LACK]:
        raise ValueError(f"the table lacks the columns {', '.join(unknown)}")
    for name in missing:
        table = table.append_column(name, pa.array([""] * table.num_rows, pa.string()))
    for name in _MAY_LACK:
        if name in schema.names and (table[name].null_count or table[name].type != pa.string()):
            table = table.set_column(table.schema.get_field_index(name), name, pc.fill_null(pc.cast(table[name], pa.string()), ""))
    return table.select(schema.names).cast(schema)


def deal(clips: pa.Table, seed: int, part: int) -> np.ndarray:
    """Which clips come in which order: a shuffle of the sorted ids, so it depends on the set of clips, the seed and the part alone."""
    ids = clips["clip_id"]
    if pc.count_distinct(ids).as_py() != len(ids):
        raise ValueError("clip ids are not unique")
    unfit = pc.or_(pc.equal(ids, ""), pc.match_substring_regex(ids, r"[./\\ \t\n]"))
    if pc.any(unfit).as_py():
        raise ValueError(f"{ids.filter(unfit)[0].as_py()!r} is no clip id: it names tar members, so no dots, slashes or blanks")
    rng = np.random.default_rng([seed, part] if part else seed)
    order: np.ndarray = pc.sort_indices(ids).to_numpy()[rng.permutation(len(ids))]
    return order


def write_part(root: Place, before: ClipTable, clips: pa.Table, rejected: pa.Table, seed: int, report: dict[str, Any]) -> Part:
    """Write the files of a new part behind those of `before`, named by content. The part exists when the caller says so.

    Args:
        clips: the new clips, in any order, the columns of CLIP_SCHEMA.
        rejected: what was left out, the columns of REJECTED_SCHEMA.
    """
    number, size = len(before.parts), before.shard_size
    order = deal(clips, seed, number)
    first_clip, first_shard, files = len(before), before.num_shards, []
    per_file = size * SHARDS_PER_FILE
    for start in range(0, len(order), per_file):  # the clips may be mapped: what is in memory are those of one file
        files.append(write_file(root, _gathered(clips, order[start : start + per_file]), first_shard + start // size, size))
    twins = _twins(before, clips, np.argsort(order))
    return Part(
        number=number,
        first_clip=first_clip,
        clips=len(order),
        first_shard=first_shard,
        shards=-(-len(order) // size),
        files=tuple(files),
        rejected=_keep(root, "rejected", f"{number:06d}", "parquet", _parquet(rejected)),
        withdrawn=_keep(root, "withdrawn", f"{number:06d}", "npy", _npy(twins)) if len(twins) else "",
        report=report,
    )


def write_file(root: Place, rows: pa.Table, first_shard: int, shard_size: int) -> TableFile:
    """Write clips in shard order, the columns of CLIP_SCHEMA, as one file of the table."""
    data = _ipc(_stored(rows, first_shard, shard_size), shard_size * SHARDS_PER_BATCH)
    return TableFile(_keep(root, "clips", f"{first_shard:06d}", "arrow", data), rows.num_rows)


def _keep(root: Place, folder: str, name: str, suffix: str, data: bytes) -> str:
    """Write a file named by its content, so that two writers never replace each other's; returns its name in the store."""
    relative = f"{folder}/{name}-{hashlib.sha256(data).hexdigest()[:12]}.{suffix}"
    (root / relative).write(data)
    return relative


def _stored(rows: pa.Table, first_shard: int, shard_size: int) -> pa.Table:
    """The columns of a table file: those of CLIP_SCHEMA, the place in the shards, and which texts there are."""
    position = np.arange(rows.num_rows, dtype=np.int32)
    for name in _REPEATED:
        values = pc.dictionary_encode(rows[name].combine_chunks() if rows.num_rows else rows[name])
        rows = rows.set_column(rows.column_names.index(name), name, values)
    return (
        rows.append_column("shard", pa.array(first_shard + position // shard_size))
        .append_column("position", pa.array(position % shard_size))
        .append_column("texts", pa.array(_text_bits(rows)))
    )


def _text_bits(rows: pa.Table) -> np.ndarray:
    """For every clip one bit per kind of TEXTS that is more than blanks; labels count as they are."""
    bits = np.zeros(rows.num_rows, np.uint8)
    for bit, name in enumerate(TEXTS):
        column = rows[name].combine_chunks() if rows.num_rows else rows[name]
        if pa.types.is_list(column.type):
            parents = pc.list_parent_indices(column)
            words = pc.list_flatten(column)
            some = (
                pc.is_valid(words)
                if name == "labels"
                else pc.greater(pc.binary_length(pc.utf8_trim_whitespace(pc.fill_null(pc.list_flatten(column), ""))), 0)
            )
            there = parents.filter(some).to_numpy(zero_copy_only=False)
        else:
            there = np.flatnonzero(pc.greater(pc.binary_length(pc.fill_null(column, "")), 0).to_numpy(zero_copy_only=False))
        bits[there] |= np.uint8(1 << bit)
    return bits


def _ipc(table: pa.Table, rows_per_batch: int) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    return sink.getvalue()


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _gathered(clips: pa.Table, places: np.ndarray) -> pa.Table:
    """The clips at these places, in their order. Arrow's own `take` copies whole columns first, which end at 2 GB."""
    order = np.argsort(places)
    ascending, start, parts = places[order], 0, []
    for batch in clips.to_batches():
        first, end = np.searchsorted(ascending, (start, start + len(batch)))
        parts.append(batch.take(pa.array(ascending[first:end] - start)))
        start += len(batch)
    return pa.Table.from_batches(parts, clips.schema).combine_chunks().take(pa.array(np.argsort(order)))


def _twins(before: ClipTable, new: pa.Table, places: np.ndarray) -> np.ndarray:
    """Training clips, old and new, whose recording is held out somewhere: equal `origin` or `content`. Ascending, not withdrawn yet.

    `places` says where each of the new ones lies among them, in shard order.
    """
    names = ["split", "origin", "content"]
    parts = [part.set_column(0, "split", pc.cast(part["split"], pa.string())) for _, part in before.columns(names)]
    parts.append(new.select(names))
    found: list[np.ndarray] = []
    for name in ("origin", "content"):
        held_out = [part[name].filter(pc.and_(pc.not_equal(part["split"], "train"), pc.not_equal(part[name], ""))) for part in parts]
        values = pc.unique(pa.chunked_array([chunk for column in held_out for chunk in column.chunks], pa.string()))
        start = 0
        for part in parts:
            same = np.flatnonzero(pc.and_(pc.equal(part["split"], "train"), pc.is_in(part[name], value_set=values)).to_numpy())
            found.append(start + (places[same] if part is parts[-1] else same))
            start += part.num_rows
    return np.setdiff1d(np.concatenate(found), before.withdrawn)


def same_parts(parts: Sequence[Part]) -> str:
    """A digest of what a store holds: the names of its files are those of their content."""
    return digest([[[file.name for file in part.files], part.withdrawn] for part in parts], 16)
