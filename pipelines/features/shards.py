"""One shard of one series: its ledger row, how it is written, and how its members become arrays again.

Members are WebDataset's, `<clip_id>.<suffix>` in a tar of fixed bytes: arrays as npy, sound as FLAC. The ledger row is
written last and makes the shard exist; it says where each member lies, so that a reader never scans a tar.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import webdataset

from stages.audio import decode_flac

if TYPE_CHECKING:
    from pipelines.features.store import FeatureStore

Member = np.ndarray | bytes


@dataclass(frozen=True)
class Rejection:
    """A clip that a pass could not use."""

    clip_id: str
    reason: str


@dataclass(frozen=True)
class LedgerRow:
    """What makes a shard exist."""

    shard: int
    count: int
    num_bytes: int
    sha256: str
    clip_ids: tuple[str, ...]
    rejected: tuple[Rejection, ...]
    members: tuple[str, ...]  # suffixes, such as "mel.npy"
    spans: tuple[tuple[int, ...], ...]  # per clip: offset and size of each member in the tar

    def to_json(self) -> bytes:
        """The row as it lies in the store."""
        return (json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":")) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> LedgerRow:
        """Inverse of `to_json`; raises ValueError for anything that is no ledger row."""
        try:
            values = json.loads(data)
            row = cls(
                shard=int(values["shard"]),
                count=int(values["count"]),
                num_bytes=int(values["num_bytes"]),
                sha256=str(values["sha256"]),
                clip_ids=tuple(values["clip_ids"]),
                rejected=tuple(Rejection(**entry) for entry in values["rejected"]),
                members=tuple(values["members"]),
                spans=tuple(map(tuple, values["spans"])),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a ledger row: {error!r}") from error
        if not row.count == len(row.clip_ids) == len(row.spans):
            raise ValueError(f"the row counts {row.count} clips but names {len(row.clip_ids)}")
        return row


class ShardWriter:
    """Writes one shard of one series, clip by clip; leaving the `with` block without an error makes it exist."""

    def __init__(self, store: FeatureStore, series: str, shard: int) -> None:
        self.store, self.series, self.shard = store, series, shard
        self.row: LedgerRow | None = None
        self._clip_ids: list[str] = []
        self._spans: list[tuple[int, ...]] = []
        self._members: tuple[str, ...] | None = None
        self._rejected: list[Rejection] = []

    def __enter__(self) -> ShardWriter:
        self._final = self.store.path(self.series, f"{self.shard:06d}.tar")
        self._draft = f"{self._final}.draft-{uuid.uuid4().hex}"
        self.store.fs.makedirs(self.store.path(self.series), exist_ok=True)
        self._file = self.store.fs.open(self._draft, "wb")
        self._stream = _HashedStream(self._file)
        # A tar of fixed bytes: no times, no users, nothing compressed.
        self._tar = webdataset.TarWriter(self._stream, user="", group="", mode=0o444, mtime=0, compress=False, encoder=False)
        return self

    def add(self, clip_id: str, members: Mapping[str, Member]) -> None:
        """Append a clip. Members are named by suffix ("mel.npy"); arrays are written as npy, bytes as they are."""
        names = tuple(sorted(members))
        if self._members not in (None, names):
            raise ValueError(f"{self.series} holds {self._members} for every clip, {clip_id} brings {names}")
        self._members = names
        spans: list[int] = []
        for name in names:
            data = _encode(name, members[name])
            self._tar.write({"__key__": clip_id, name: data})
            spans += (self._tar.tarstream.offset - -(-len(data) // 512) * 512, len(data))
        self._clip_ids.append(clip_id)
        self._spans.append(tuple(spans))

    def reject(self, clip_id: str, reason: str) -> None:
        """Note that a clip is left out, and why."""
        self._rejected.append(Rejection(clip_id, reason))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            with suppress(OSError):  # a full disk, say, which is already on its way to the user
                self._tar.close()
                self._file.close()
            self.store.fs.rm_file(self._draft)
            return
        self._tar.close()
        self._file.close()
        self.store.rename(self._draft, self._final)
        self.row = LedgerRow(
            shard=self.shard,
            count=len(self._clip_ids),
            num_bytes=self._stream.size,
            sha256=self._stream.digest.hexdigest(),
            clip_ids=tuple(self._clip_ids),
            rejected=tuple(self._rejected),
            members=self._members or (),
            spans=tuple(self._spans),
        )
        self.store.write(self.row.to_json(), self.series, f"{self.shard:06d}.json")


class _HashedStream(io.RawIOBase):
    """Passes bytes on to a file and knows their number and checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)


def _encode(name: str, value: Member) -> bytes:
    if isinstance(value, bytes):
        return value
    if not name.endswith(".npy"):
        raise ValueError(f"an array is stored as .npy, not as {name!r}")
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=False)
    return buffer.getvalue()


def decode_member(name: str, data: memoryview) -> np.ndarray:
    """What a member holds, by its suffix: arrays as they were written, FLAC as float32 samples."""
    if name.endswith(".npy"):
        return _decode_npy(data)
    if name.endswith(".flac"):
        return decode_flac(bytes(data))
    raise ValueError(f"nothing here decodes {name!r}; members end in .npy or .flac")


def _decode_npy(data: memoryview) -> np.ndarray:
    """What `np.load(allow_pickle=False)` gives, without copying and with the header parsed only once per shape."""
    start = 10 + int.from_bytes(data[8:10], "little")
    dtype, shape, order = _npy_header(bytes(data[:start]))
    return np.frombuffer(data, dtype, offset=start).reshape(shape, order=order)


@lru_cache(maxsize=4096)
def _npy_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], Any]:
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"npy version {version}; the store writes version (1, 0)")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise ValueError("an array of Python objects is not read from a store")
    return dtype, shape, "F" if fortran else "C"


def feature_name(member: str) -> str:
    """What `StoreReader.read` calls a member: "mel.npy" is "mel"."""
    return member.partition(".")[0]


def completing_command(series: str) -> str:
    """The command that makes the missing shards of a series."""
    kind, _, pooling = series.partition("-")
    if kind == "loa":
        return f"loa preprocess loa --pooling {pooling}"
    return f"loa preprocess {'mel' if series == 'waveform' else series}"
