"""Records and rows that wait on the disk, so that an ingest of millions of recordings holds some thousand of them at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from pipelines.corpora.records import Record, Recording, Rejected

BATCH = 4096  # records or rows in memory

T = TypeVar("T")

_FIELDS = [field.name for field in fields(Recording)]
_LISTS = {"captions", "labels"}
_TYPES = {"start": pa.float64(), "seconds": pa.float64(), "precut": pa.bool_()} | dict.fromkeys(_LISTS, pa.list_(pa.string()))
_SCHEMA = pa.schema([(name, _TYPES.get(name, pa.string())) for name in _FIELDS] + [("clip_id", pa.string()), ("reason", pa.string())])


class Spool:
    """Records in a file, in their order: written once, read any number of times."""

    def __init__(self, path: Path, records: Iterable[Record]) -> None:
        self.path, self.recordings = path, 0  # how many of the records are recordings
        with pa.ipc.new_file(str(path), _SCHEMA, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
            for batch in chunks(records):
                columns = [pa.array([getattr(record, field.name, None) for record in batch], field.type) for field in _SCHEMA]
                writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
                self.recordings += sum(isinstance(record, Recording) for record in batch)

    def __iter__(self) -> Iterator[Record]:
        with pa.OSFile(str(self.path)) as file, pa.ipc.open_file(file) as reader:
            for number in range(reader.num_record_batches):
                columns = reader.get_batch(number).to_pydict()
                for name in _LISTS:
                    columns[name] = [tuple(value or ()) for value in columns[name]]
                clip_ids, reasons = columns.pop("clip_id"), columns.pop("reason")
                rows = zip(*columns.values(), strict=True)
                for row, clip_id, reason in zip(rows, clip_ids, reasons, strict=True):
                    yield Recording(*row) if reason is None else Rejected(row[0], row[_FIELDS.index("path")], clip_id, reason)


class View:
    """What a function makes of records as they pass, each time they are read."""

    recordings: int  # how many it is given

    def __init__(self, records: Spool | View, change: Callable[[Iterable[Record]], Iterator[Record]]) -> None:
        self.records, self.change, self.recordings = records, change, records.recordings

    def __iter__(self) -> Iterator[Record]:
        return self.change(self.records)


class Hashes:
    """A set of texts in 8 bytes each. Of some million texts one in a trillion others seems to be among them."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._hashes = np.unique(np.fromiter(map(hash, texts), np.int64))

    def __contains__(self, text: str) -> bool:
        place = int(np.searchsorted(self._hashes, hash(text)))
        return place < len(self._hashes) and int(self._hashes[place]) == hash(text)


class RowFile:
    """Rows of a schema on their way into a file; `table` maps them when all are written."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema, self._waiting = path, schema, list[Mapping[str, Any]]()

    def __enter__(self) -> RowFile:
        self._writer = pa.ipc.new_file(str(self.path), self.schema)
        return self

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        self._waiting.append(row)
        if len(self._waiting) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._waiting, self.schema))
        self._waiting = []

    def __exit__(self, *_: object) -> None:
        if self._waiting:
            self._flush()
        self._writer.close()

    def table(self) -> pa.Table:
        """All rows, mapped into memory."""
        return pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()


def chunks(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """Consecutive groups of `size` items, the last one smaller."""
    iterator = iter(items)
    while some := list(itertools.islice(iterator, size)):
        yield some


def at(places: np.ndarray, items: Iterable[T]) -> Iterator[T]:
    """The items at ascending places."""
    wanted = iter(places.tolist())
    place = next(wanted, None)
    for number, item in enumerate(items):
        if number == place:
            yield item
            place = next(wanted, None)
