"""Recordings wherever they lie: in a file, behind a URL, or inside a larger file. An address says where.

/corpora/dog.wav                                 a file
s3://bucket/dog.wav                              the same behind a URL
s3://bucket/000.tar#bytes=512-88244              88,244 bytes from byte 512 on: a member of a tar, a value in an Arrow file
/corpora/x.parquet#column=audio&row=00000017     the sound in a row of a Parquet file
"""

from __future__ import annotations

import io
import re
import threading
from functools import lru_cache
from os import PathLike, fspath
from typing import Any, BinaryIO, NamedTuple, cast

from stages.errors import AudioError

AT_ONCE = 8 << 20  # bytes; a remote stretch up to this size takes a single request
READ_AHEAD = 1 << 20  # bytes fetched at once of a longer one

_STRETCH = re.compile(r"(.+)#bytes=(\d+)-(\d+)", re.DOTALL)
_ROW = re.compile(r"(.+)#column=([^&#]+)&row=(\d+)", re.DOTALL)


class Address(NamedTuple):
    """An address taken apart: the file, and where in it the recording lies (nothing of it for a whole file)."""

    file: str  # a path or URL
    offset: int = 0
    length: int | None = None  # bytes
    column: str | None = None
    row: int = 0

    @property
    def remote(self) -> bool:
        """Whether the file lies behind a URL."""
        return "://" in self.file

    @property
    def plain(self) -> bool:
        """Whether it is just the path of a file here, which any library can open."""
        return self.length is None and self.column is None and not self.remote


def stretch_of(file: str, offset: int, length: int) -> str:
    """The address of `length` bytes of a file from byte `offset` on."""
    return f"{file}#bytes={offset}-{length}"


def row_of(file: str, column: str, row: int) -> str:
    """The address of a value of a Parquet file. Rows have eight digits, so that sorted addresses are in the order of the file."""
    return f"{file}#column={column}&row={row:08d}"


def parse_address(path: str | PathLike[str]) -> Address:
    """Take an address apart; anything without one of the endings above is the name of a file."""
    text = fspath(path)
    if match := _STRETCH.fullmatch(text):
        return Address(match[1], int(match[2]), int(match[3]))
    if match := _ROW.fullmatch(text):
        return Address(match[1], column=match[2], row=int(match[3]))
    return Address(text)


def open_recording(path: str | PathLike[str]) -> BinaryIO:
    """The bytes of a recording as a seekable file, read by range: nothing before or behind them is fetched.

    Raises OSError when the file cannot be read (FileNotFoundError: it is not there), AudioError when it has no such row.
    """
    address = parse_address(path)
    if address.column is not None:
        return io.BytesIO(_parquet_value(address))
    if address.remote:
        from stages.remote import ask, open_remote

        if address.length is not None and address.length <= AT_ONCE:
            end = address.offset + address.length
            return io.BytesIO(ask(address.file, lambda fs, path: fs.cat_file(path, start=address.offset, end=end)))
        opened = open_remote(address.file, cache_type="readahead", block_size=READ_AHEAD)
    else:
        opened = cast(BinaryIO, io.BufferedReader(io.FileIO(address.file)))
    if address.length is None:
        return opened
    return cast(BinaryIO, io.BufferedReader(_Stretch(opened, address.offset, address.length), 1 << 16))


class _Stretch(io.RawIOBase):
    """Some consecutive bytes of an open file as a file of their own; closes the outer one with itself."""

    def __init__(self, file: Any, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._position)
        data = self._file.read(max(0, min(len(buffer), self._length - self._position)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _parquet_value(address: Address) -> bytes:
    assert address.column is not None
    starts = _row_groups(address.file)
    group = next((i for i, start in enumerate(starts[:-1]) if start <= address.row < starts[i + 1]), None)
    if group is None:
        raise AudioError(f"{address.file} has {starts[-1]} rows, so there is no row {address.row} (they count from 0)")
    with _ONE_GROUP:
        sounds = _row_group(address.file, group, address.column)
    value = sounds[address.row - starts[group]].as_py()
    if value is None:
        raise AudioError(f"row {address.row} of {address.file} holds no sound")
    return bytes(value)


@lru_cache(maxsize=64)
def _row_groups(file: str) -> tuple[int, ...]:
    """The first row of every row group, and the number of rows."""
    with _parquet(file) as parquet:
        starts = [0]
        for group in range(parquet.metadata.num_row_groups):
            starts.append(starts[-1] + parquet.metadata.row_group(group).num_rows)
        return tuple(starts)


_ONE_GROUP = threading.Lock()  # threads that want the same group wait for the first one's


@lru_cache(maxsize=2)  # of some 100 rows each: whoever reads in order, in a few threads, decompresses each group once
def _row_group(file: str, group: int, column: str) -> Any:
    """The sounds of a row group as an Arrow array of binaries."""
    import pyarrow as pa

    with _parquet(file) as parquet:
        kind = parquet.schema_arrow.field(column).type
        if pa.types.is_struct(kind):
            return parquet.read_row_group(group, columns=[f"{column}.bytes"])[column].combine_chunks().field("bytes")
        return parquet.read_row_group(group, columns=[column])[column].combine_chunks()


def _parquet(file: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source: Any = file
    if "://" in file:
        from stages.remote import open_remote

        source = open_remote(file)
    try:
        return pq.ParquetFile(source)
    except pa.ArrowInvalid as error:
        raise AudioError(f"{file} cannot be read as Parquet: {error}") from error
