"""Random access to a feature store: the features of single clips, by number."""

from __future__ import annotations

import os
import shutil
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.features.ledger import Ledger, Span
from pipelines.features.shards import completing_command, decode_member, feature_name
from pipelines.features.table import ClipTable
from stages.errors import UserError
from stages.files import Place, default_cache, digest, replacing

_MOST_OPEN_SHARDS = 256
_SPARE_DISK = 1 << 30  # bytes that fetching ahead leaves free
_DEAD = 600.0  # seconds after which a shard is no longer being fetched by whoever began


class StoreReader:
    """The features of single clips, in any order and from any thread or process.

    Shards are opened when first needed and read at the offsets the ledger knows: nothing is scanned, and what is read is
    compared with its checksum. A reader pickles without its open files, and holds no object per clip.

    Attributes:
        mask: which clips of the table all series hold, [clips] bool.
    """

    _brought: set[Path]  # shards of a remote store that this reader has on this machine's disk

    def __init__(self, table: ClipTable, ledgers: Mapping[str, Ledger], shards: Sequence[int]) -> None:
        self.table, self.ledgers, self.series = table, dict(ledgers), tuple(ledgers)
        self._members = {name: ledger.members for name, ledger in ledgers.items()}
        self.mask = np.ones(len(table), bool)
        for ledger in ledgers.values():
            held = np.zeros(len(table), bool)
            ledger.mark(held, shards)
            self.mask &= held
        self._forget()

    @cached_property
    def numbers(self) -> np.ndarray:
        """The clips that all series hold, ascending: [n] int64."""
        return np.flatnonzero(self.mask)

    @cached_property
    def clip_ids(self) -> list[str]:
        """The ids of `numbers`: for small stores and single shards."""
        return self.table.ids(self.numbers)

    @cached_property
    def _by_id(self) -> dict[str, int]:
        return dict(zip(self.clip_ids, self.numbers.tolist(), strict=True))

    def __len__(self) -> int:
        return int(np.count_nonzero(self.mask))

    def __contains__(self, clip: int | str) -> bool:
        return clip in self._by_id if isinstance(clip, str) else bool(0 <= clip < len(self.mask) and self.mask[clip])

    def read(self, clip: int | str, series: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """The features of a clip by name: "mel", "waveform" (float32 samples), "loa", "t5", ...

        Args:
            clip: its number; or its id, which needs the ids of all clips in memory.
            series: which to read; by default all.

        Raises:
            KeyError: not all series hold the clip.
            UserError: two of the series hold the same name, or what lies there is damaged; the message says what repairs it.
        """
        if clip not in self:
            raise KeyError(f"{clip} is not in all of {', '.join(self.series)}")
        number = self._by_id[clip] if isinstance(clip, str) else clip
        shard = self.table.shard_of(number)
        features: dict[str, np.ndarray] = {}
        for one in series or self.series:
            span = self.ledgers[one].find(shard, number)
            for name, data in zip(self._members[one], self._fetch(one, shard, number, span), strict=True):
                if (feature := feature_name(name)) in features:
                    raise UserError(f"two of the series {', '.join(series or self.series)} hold {feature!r}; read them one at a time")
                features[feature] = decode_member(name, data)
        return features

    @property
    def remote(self) -> bool:
        """Whether the store lies elsewhere, so that fetching whole shards ahead pays."""
        return not self.table.root.local

    def fetch(self, shards: Iterable[int]) -> None:
        """Bring these shards of a remote store to this machine's disk, where `read` finds them; those that it brought before go.

        Of several workers of a machine one fetches a shard. Whoever reads meanwhile reads by ranges what is not there yet; what
        cannot be fetched is left to them as well.
        """
        wanted = {self._local(place): (place, size) for place, size in self._objects(shards)}
        for old in self._brought - set(wanted):
            old.unlink(missing_ok=True)  # open files stay readable
        self._brought = set(wanted)
        for path, (place, size) in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < size + _SPARE_DISK:
                return
            with suppress(OSError), _first(path.with_suffix(".fetching")) as mine:
                if mine and not path.exists():
                    with replacing(path) as draft:
                        place.download(draft)

    def _objects(self, shards: Iterable[int]) -> Iterator[tuple[Place, int]]:
        for shard in shards:
            for ledger in self.ledgers.values():
                yield ledger.folder / ledger[shard].object, ledger[shard].num_bytes

    def _local(self, place: Place) -> Path:
        """Where a fetched shard of a remote store lies; its name is that of its content."""
        return default_cache() / "shards" / digest(self.table.root.url, 24) / place.parent.name / place.name

    def _fetch(self, series: str, shard: int, number: int, span: Span) -> list[memoryview]:
        """The members of a clip, in memory of their own so that arrays over it can be written to."""
        starts, sizes = span.offsets[::2], span.offsets[1::2]
        first, end = starts[0], starts[-1] + sizes[-1]  # a clip's members lie next to each other
        data = memoryview(self._bytes(series, shard, span, first, end))
        members = [data[start - first : start - first + size] for start, size in zip(starts, sizes, strict=True)]
        checksum = 0
        for member in members:
            checksum = zlib.crc32(member, checksum)
        if len(data) != end - first or checksum != span.checksum:
            clip_id, place = self.table.row(number)["clip_id"], self.ledgers[series].folder / span.object
            raise UserError(
                f"the clip {clip_id} of the series {series!r} is damaged: its bytes in shard {shard} ({place}) "
                f"do not have the checksum of the ledger; repair it with `{completing_command(series)} --verify`"
            )
        return members

    def _bytes(self, series: str, shard: int, span: Span, first: int, end: int) -> bytearray:
        with self._lock:
            opened = self._opened.pop((series, shard), None)
            if opened is None:
                opened = self._open(series, span)
            self._opened[series, shard] = opened
            if len(self._opened) > _MOST_OPEN_SHARDS:
                self._opened.popitem(last=False)  # closed when the last thread using it lets go
        if isinstance(opened, Place):
            if self._local(opened).exists():  # fetched since
                with self._lock:
                    self._opened.pop((series, shard), None)
                return self._bytes(series, shard, span, first, end)
            return bytearray(opened.read_range(first, end))
        data = bytearray(end - first)
        del data[os.preadv(opened.fileno(), [data], first) :]
        return data

    def _open(self, series: str, span: Span) -> Any:
        """An open file of a local store, the place in a remote one; either way of the size the ledger says."""
        place = self.ledgers[series].folder / span.object
        try:
            here = place.path if place.local else self._local(place)
            opened = _Shard(str(here)) if place.local or here.exists() else place
            size = os.fstat(opened.fileno()).st_size if isinstance(opened, _Shard) else place.size()
        except FileNotFoundError:
            opened, size = place, 0
        if size != span.num_bytes:
            raise UserError(
                f"{place} has {size} bytes where its ledger says {span.num_bytes}; recompute it with `{completing_command(series)}`"
            )
        return opened

    def _forget(self) -> None:
        self._opened: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._brought = set[Path]()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_opened", "_brought", "_lock", "numbers", "clip_ids", "_by_id")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


@contextmanager
def _first(mark: Path) -> Iterator[bool]:
    """Whether this process alone is at what `mark` stands for, during the block; the mark of one that died counts for a while."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        with suppress(FileNotFoundError):
            if time.time() - mark.stat().st_mtime > _DEAD:
                mark.unlink()  # whoever comes next takes it
        yield False
        return
    try:
        yield True
    finally:
        mark.unlink(missing_ok=True)


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
