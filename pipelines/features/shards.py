"""One shard of one series: how it is written, and how its members become arrays again.

Members are WebDataset's, `<clip_id>.<suffix>` in a tar of fixed bytes: arrays as npy, sound as FLAC. The tar is named by its
content, so two who make the same shard never mix theirs; the ledger row is written last and says which one exists.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import uuid
import zlib
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import webdataset

from pipelines.features.ledger import Ledger, LedgerRow, Rejection, compact, journal_name
from stages.audio import decode_flac
from stages.files import Place

Member = np.ndarray | bytes
DRAFT = ".tar.draft-"


class ShardWriter:
    """Writes one shard of one series, clip by clip; leaving the `with` block without an error makes it exist.

    Args:
        folder: of the series.
        numbers: of the shard's clips, by id, in the order of the clip table.
        job: whose draft it is; drafts of jobs that are gone are removed.
        remake: take the place of a shard that exists; else the one that exists stays.
    """

    def __init__(self, folder: Place, shard: int, numbers: Mapping[str, int], job: str = "none", remake: bool = False) -> None:
        self.folder, self.shard, self.numbers, self.job, self.remake = folder, shard, numbers, job, remake
        self.row: LedgerRow | None = None
        self._clips: list[int] = []
        self._spans: list[int] = []
        self._checksums: list[int] = []
        self._members: tuple[str, ...] | None = None
        self._rejected: list[Rejection] = []

    @property
    def series(self) -> str:
        """The series it belongs to."""
        return self.folder.name

    def __enter__(self) -> ShardWriter:
        self._cleanup = ExitStack()
        name = f"{self.shard:06d}{DRAFT}{self.job}-{uuid.uuid4().hex[:8]}"
        if self.folder.local:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            self._draft = self.folder.path / name
        else:  # an object store shows an object when all of it has arrived, so the draft waits here
            self._draft = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="loa-"))) / name
        self._file = open(self._draft, "wb")
        self._stream = _HashedStream(self._file)
        # A tar of fixed bytes: no times, no users, nothing compressed.
        self._tar = webdataset.TarWriter(self._stream, user="", group="", mode=0o444, mtime=0, compress=False, encoder=False)
        return self

    def add(self, clip_id: str, members: Mapping[str, Member]) -> None:
        """Append a clip. Members are named by suffix ("mel.npy"); arrays are written as npy, bytes as they are.

        Raises ValueError for a clip of another shard, out of order, or with other members than the first.
        """
        number = self.numbers.get(clip_id)
        if number is None or (self._clips and number <= self._clips[-1]):
            where = "is not in" if number is None else "comes too late in"
            raise ValueError(f"{clip_id} {where} shard {self.shard}: clips are written in the order of the clip table")
        names = tuple(sorted(members))
        if self._members not in (None, names):
            raise ValueError(f"{self.series} holds {self._members} for every clip, {clip_id} brings {names}")
        self._members = names
        checksum = 0
        for name in names:
            data = _encode(name, members[name])
            self._tar.write({"__key__": clip_id, name: data})
            self._spans += (self._tar.tarstream.offset - -(-len(data) // 512) * 512, len(data))
            checksum = zlib.crc32(data, checksum)
        self._clips.append(number)
        self._checksums.append(checksum)

    def reject(self, clip_id: str, reason: str) -> None:
        """Note that a clip is left out, and why."""
        self._rejected.append(Rejection(clip_id, reason))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._cleanup:
            if kind is not None:
                with suppress(OSError):  # a full disk, say, which is already on its way to the user
                    self._tar.close()
                    self._file.close()
                self._draft.unlink(missing_ok=True)
                return
            self._tar.close()
            self._file.close()
            sha256 = self._stream.digest.hexdigest()
            row = LedgerRow(
                shard=self.shard,
                object=f"{self.shard:06d}-{sha256[:12]}.tar",
                num_bytes=self._stream.size,
                sha256=sha256,
                members=self._members or (),
                clips=tuple(self._clips),
                spans=tuple(self._spans),
                checksums=tuple(self._checksums),
                rejected=tuple(self._rejected),
            )
            if self.folder.local:
                self._draft.replace(self.folder.path / row.object)
            else:
                (self.folder / row.object).upload(self._draft)
            self.row = (replace if self.remake else publish)(self.folder, row)


def publish(folder: Place, row: LedgerRow) -> LedgerRow:
    """Let the shard of `row`, whose object is in its place, exist; returns the row that does.

    Of two who make a shard at once one comes first, and the other's object is removed. A row that is damaged, or whose
    object is gone, is replaced.
    """
    place = folder / journal_name(row.shard)
    if place.create(row.to_json()):
        return row
    try:
        first = LedgerRow.from_json(place.read())
        good = (folder / first.object).size() == first.num_bytes
    except (FileNotFoundError, ValueError):
        good = False
    if not good:
        place.write(row.to_json())
        return row
    if first.object != row.object:
        (folder / row.object).remove()
    return first


def replace(folder: Place, row: LedgerRow) -> LedgerRow:
    """Let `row` take the place of the row of its shard, if there is one. In between the shard is missing, never mixed."""
    before = Ledger(folder, "", [row.shard], check=False).get(row.shard)
    if before is not None:
        compact(folder, {row.shard: before.object})
        if before.object != row.object:
            (folder / before.object).remove()
    return publish(folder, row)


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
    """What a reader calls a member: "mel.npy" is "mel"."""
    return member.partition(".")[0]


def completing_command(series: str) -> str:
    """The command that makes the missing shards of a series."""
    kind, _, pooling = series.partition("-")
    if kind == "loa":
        return f"loa preprocess loa --pooling {pooling}"
    return f"loa preprocess {'mel' if series == 'waveform' else series}"
