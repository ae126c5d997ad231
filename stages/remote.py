"""Filesystems behind URLs, by fsspec. What goes wrong out there is an OSError, whatever the library behind the scheme raises."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar, cast

import fsspec

from stages.errors import UnreachableError, UserError

EXTRAS = {"s3": "s3", "s3a": "s3"}  # scheme → the extra of loa that brings its filesystem
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")

T = TypeVar("T")


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URL and the path in it. Nothing is kept here: fsspec shares one connection per process.

    Raises UserError when nothing installed reads its scheme; the message says what to install.
    """
    scheme = url.partition("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)  # others write here too
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        cure = f"pip install 'loa[{extra}]'" if extra else f"install its package ({error})"
        raise UserError(f"{url} cannot be reached: nothing installed reads {scheme}://; {cure}") from error
    except ValueError as error:
        raise UserError(
            f"{url} cannot be reached: {scheme}:// is no scheme that fsspec knows ({error}); "
            "give a path, s3://BUCKET/… or another of its URLs"
        ) from error
    return fs, path


def ask(url: str, request: Callable[[Any, str], T]) -> T:
    """What `request(filesystem, path)` returns. Raises OSError for whatever else goes wrong: no network, no rights, no such file."""
    fs, path = filesystem(url)
    return _answer(url, lambda: request(fs, path))


def open_remote(url: str, **options: Any) -> BinaryIO:
    """A file behind a URL to read from, by ranges as one goes along; `options` are those of fsspec's `open`."""
    return cast(BinaryIO, io.BufferedReader(_File(url, ask(url, lambda fs, path: fs.open(path, "rb", **options)))))


def _answer(url: str, request: Callable[[], T]) -> T:
    try:
        return request()
    except OSError:
        raise
    except Exception as error:  # botocore's and others' are no OSError
        raise UnreachableError(f"{url}: {type(error).__name__}: {error}") from error


class _File(io.RawIOBase):
    """A file of fsspec's whose errors are OSErrors."""

    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position: int = self._file.seek(offset, whence)
        return position

    def tell(self) -> int:
        position: int = self._file.tell()
        return position

    def readinto(self, buffer: Any) -> int:
        data: bytes = _answer(self._url, lambda: self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
