"""Random access to a feature store: the features of single clips, by id."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from pipelines.features.shards import LedgerRow, completing_command, decode_member, feature_name
from stages.errors import UserError

if TYPE_CHECKING:
    from pipelines.features.store import FeatureStore

_MOST_OPEN_SHARDS = 256


class StoreReader:
    """The features of single clips, in any order and from any thread or process.

    Shards are opened when first needed and read at the offsets the ledger knows: nothing is scanned. A reader
    pickles without its open files.
    """

    def __init__(self, store: FeatureStore, ledgers: Mapping[str, Sequence[LedgerRow]]) -> None:
        self.store = store
        self.series = tuple(ledgers)
        self._sizes = {name: {row.shard: row.num_bytes for row in rows} for name, rows in ledgers.items()}
        self._members = {name: next((row.members for row in rows if row.count), ()) for name, rows in ledgers.items()}
        self._check_names()
        self.clip_ids: list[str] = []
        shards: list[int] = []
        spans: dict[str, list[tuple[int, ...]]] = {name: [] for name in self.series}
        for rows in zip(*ledgers.values(), strict=True):
            places = [dict(zip(row.clip_ids, row.spans, strict=True)) for row in rows]
            for clip_id in rows[0].clip_ids:
                if all(clip_id in place for place in places):
                    self.clip_ids.append(clip_id)
                    shards.append(rows[0].shard)
                    for name, place in zip(self.series, places, strict=True):
                        spans[name].append(place[clip_id])
        self._shards = np.array(shards, np.int32)
        self._spans = {name: np.array(spans[name], np.int64).reshape(len(shards), -1) for name in self.series}
        self._forget()

    def __len__(self) -> int:
        return len(self.clip_ids)

    def __contains__(self, clip_id: object) -> bool:
        return clip_id in self._numbers

    def read(self, clip_id: str) -> dict[str, np.ndarray]:
        """The features of a clip by name: "mel", "waveform" (float32 samples), "loa", "t5", ...

        Raises KeyError for a clip that not all series hold.
        """
        try:
            number = self._numbers[clip_id]
        except KeyError:
            raise KeyError(f"{clip_id} is not in all of {', '.join(self.series)}") from None
        shard = int(self._shards[number])
        features = {}
        for series, members in self._members.items():
            spans = self._spans[series][number].tolist()
            first, end = spans[0], spans[-2] + spans[-1]  # a clip's members lie next to each other
            data = memoryview(self._fetch(series, shard, first, end))
            for name, offset, size in zip(members, spans[::2], spans[1::2], strict=True):
                features[feature_name(name)] = decode_member(name, data[offset - first : offset - first + size])
        return features

    def _fetch(self, series: str, shard: int, first: int, end: int) -> bytearray:
        """Bytes of a shard, in memory of their own so that arrays over it can be written to."""
        with self._lock:
            opened = self._opened.pop((series, shard), None)
            if opened is None:
                opened = self._open(series, shard)
            self._opened[series, shard] = opened
            if len(self._opened) > _MOST_OPEN_SHARDS:
                self._opened.popitem(last=False)  # closed when the last thread using it lets go
        if isinstance(opened, str):
            return bytearray(self.store.fs.cat_file(opened, start=first, end=end))
        data = bytearray(end - first)
        if os.preadv(opened.fileno(), [data], first) != len(data):
            raise OSError(f"{opened.name} ended early")
        return data

    def _open(self, series: str, shard: int) -> Any:
        """An open file of a local store, the path in a remote one; either way of the size the ledger says."""
        path = self.store.path(series, f"{shard:06d}.tar")
        local = isinstance(self.store.fs, LocalFileSystem)
        try:
            opened = _Shard(path) if local else path
            size = os.fstat(opened.fileno()).st_size if isinstance(opened, _Shard) else self.store.fs.size(path)
        except FileNotFoundError:
            opened, size = path, 0
        expected = self._sizes[series][shard]
        if size != expected:
            raise UserError(f"{path} has {size} bytes where its ledger says {expected}; recompute it with `{completing_command(series)}`")
        return opened

    def _check_names(self) -> None:
        owner: dict[str, str] = {}
        for series, members in self._members.items():
            for name in map(feature_name, members):
                if name in owner:
                    raise UserError(f"the series {owner[name]!r} and {series!r} both hold {name!r}; read them one at a time")
                owner[name] = series

    def _forget(self) -> None:
        self._numbers = {clip_id: number for number, clip_id in enumerate(self.clip_ids)}
        self._opened: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_numbers", "_opened", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class _Shard:
    """A local file open for reading, closed with the last reference to it."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def fileno(self) -> int:
        return self._descriptor

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
