"""Where files and folders lie (`Place`), written whole or not at all, and what identifies their content."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from stages.errors import UserError
from stages.exclusive import create_whole
from stages.remote import EXTRAS, SCHEME, ask, filesystem, open_remote


@contextmanager
def replacing(final: Path | str, suffix: str = "") -> Iterator[Path]:
    """Yield a path beside `final` to write to; what was written there takes the place of `final` at the end, or nothing does.

    A reader sees the old file or the new one, never half of it. `suffix` is for writers that insist on one.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = final.with_name(f".{final.name}.{os.getpid()}.{threading.get_ident()}{suffix}")
    try:
        yield draft
        os.replace(draft, final)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yield a folder beside `final` that takes its place only when everything in it has been written."""
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield draft
        draft.chmod(0o755)
        if final.exists():
            old = draft.with_name(draft.name + ".old")
            os.replace(final, old)
            os.replace(draft, final)
            shutil.rmtree(old)
        else:
            os.replace(draft, final)
    finally:
        if draft.exists():
            shutil.rmtree(draft)


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    with replacing(path) as draft:
        draft.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def digest(value: Any, length: int = 64) -> str:
    """The first `length` hex digits of the sha256 of a JSON value; keys of dicts are sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:length]


def weights_hash(folder: Path) -> str:
    """sha256 over the names and contents of all safetensors files below `folder`."""
    digest = hashlib.sha256()
    files = sorted(Path(folder).rglob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no safetensors weights")
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def code_version() -> str:
    """What made the data: the git revision of a checkout ("+" when it has local changes), else the package version."""
    folder = Path(__file__).resolve().parent.parent
    if (folder / ".git").exists():
        try:
            answers = [
                subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
                for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
            ]
            return answers[0] + ("+" if answers[1] else "")
        except (OSError, subprocess.SubprocessError):
            pass  # no git here, or a checkout without commits
    try:
        return f"loa {metadata.version('loa')}"
    except metadata.PackageNotFoundError:
        return "unknown"


# ------------------------------------------------------------------------------------------------------------- places

_COLLAPSED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")  # what pathlib makes of a URL


@dataclass(frozen=True, order=True)
class Place:
    """Where a file or a folder lies: on a local disk, or on any filesystem that fsspec knows.

    Made by `Place.of`. Written whole or not at all everywhere: by renaming on a disk, by one PUT on an object store.
    Holds no connection, so it pickles and survives a fork. OSError means what it does of files: the world's fault.
    """

    url: str  # an absolute path, or a URL without a slash at its end

    @classmethod
    def of(cls, where: str | Path | Place) -> Place:
        """The place that a path or URL names; relative paths become absolute.

        Raises UserError for a scheme that nothing installed reads; the message says what to install.
        """
        if isinstance(where, Place):
            return where
        text = os.fspath(where)
        collapsed = _COLLAPSED.match(text) if isinstance(where, Path) else None
        if collapsed and collapsed[1] in fsspec.available_protocols():
            text = f"{collapsed[1]}://{text[collapsed.end() :]}"
        if "://" not in text:
            return cls(os.path.abspath(text))
        scheme = SCHEME.match(text)
        if scheme is None:
            raise UserError(
                f"{text} is no URL; expected a path, or scheme://… with one of {', '.join(sorted(EXTRAS))} or another of fsspec's"
            )
        if scheme[1].lower() in ("file", "local"):
            return cls(os.path.abspath(LocalFileSystem._strip_protocol(text)))
        place = cls(scheme[1].lower() + "://" + text[scheme.end() :].rstrip("/"))
        filesystem(place.url)
        return place

    # ------------------------------------------------------------------------------------------------------- names

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        """For `open` and libraries that take paths. Raises UserError for a place that is not local: no folder called s3: comes of it."""
        return str(self.path)

    def __truediv__(self, name: str) -> Place:
        parts = name.split("/")
        if not all(parts) or ".." in parts:
            raise ValueError(f"{name!r} names nothing inside {self.url}")
        return Place(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Place:
        """The folder it lies in."""
        if self.local:
            return Place(os.path.dirname(self.url))
        return Place(self.url.rpartition("/")[0]) if self.url.count("/") > 2 else self

    @property
    def local(self) -> bool:
        """Whether it lies on a disk of this machine."""
        return "://" not in self.url

    @property
    def path(self) -> Path:
        """It as a path. Raises UserError for a place that is not local."""
        return self.local_path("this")

    def local_path(self, who: str) -> Path:
        """It as a path, for `who` ("MLflow's database"), who cannot work on a URL. Raises UserError for a place that is not local."""
        if not self.local:
            raise UserError(f"{self.url} is not on a local disk, and {who} needs a local folder; give one")
        return Path(self.url)

    # ----------------------------------------------------------------------------------------------------- reading

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        if self.local:
            return os.path.exists(self.url)
        return ask(self.url, lambda fs, path: bool(fs.exists(path)))

    def size(self) -> int:
        """Bytes of the file. Raises FileNotFoundError."""
        if self.local:
            return os.stat(self.url).st_size
        return ask(self.url, lambda fs, path: int(fs.size(path)))

    def read(self) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        if self.local:
            return Path(self.url).read_bytes()
        return ask(self.url, lambda fs, path: bytes(fs.cat_file(path)))

    def read_range(self, first: int, end: int) -> bytes:
        """The bytes from `first` up to, without, `end`; fewer where the file ends before. Raises FileNotFoundError."""
        if self.local:
            with open(self.url, "rb") as file:
                file.seek(first)
                return file.read(end - first)
        return ask(self.url, lambda fs, path: bytes(fs.cat_file(path, start=first, end=end)))

    def open(self) -> BinaryIO:
        """The file, to read from; remote ones are read by ranges as one goes along."""
        if self.local:
            return open(self.url, "rb")
        return open_remote(self.url)

    def download(self, target: Path) -> None:
        """Copy the file to a local one. Raises FileNotFoundError."""
        if self.local:
            shutil.copyfile(self.url, target)
            return
        ask(self.url, lambda fs, path: fs.get_file(path, str(target)))

    def list(self) -> dict[str, int]:
        """Names and sizes of the files that lie directly in this folder, as they are now; none where there is no folder."""
        return {name: size for name, size in self._entries() if size is not None}

    def folders(self) -> Sequence[str]:
        """Names of the folders directly in this one, sorted."""
        return sorted(name for name, size in self._entries() if size is None)

    def tree(self) -> dict[str, int]:
        """Relative paths and sizes of all files below this folder, sorted."""
        path = filesystem(self.url)[1]
        try:
            below = ask(self.url, lambda fs, path: fs.find(path, detail=True))
        except FileNotFoundError:
            return {}
        start = len(path.rstrip("/")) + 1
        return dict(sorted((name[start:], int(entry["size"])) for name, entry in below.items() if len(name) > start))

    def _entries(self) -> Iterator[tuple[str, int | None]]:
        """(name, bytes or None for a folder). Files that vanish while they are listed are left out."""
        if self.local:
            try:
                with os.scandir(self.url) as entries:
                    for entry in entries:
                        with suppress(FileNotFoundError):
                            yield entry.name, None if entry.is_dir() else entry.stat().st_size
            except FileNotFoundError:
                pass
            return
        path = filesystem(self.url)[1]
        with suppress(FileNotFoundError):
            for entry in ask(self.url, lambda fs, path: fs.ls(path, detail=True)):
                name = entry["name"].rstrip("/").rpartition("/")[2]
                if len(entry["name"].rstrip("/")) > len(path.rstrip("/")):  # some stores list the folder's own marker
                    yield name, None if entry["type"] == "directory" else int(entry["size"])

    # ----------------------------------------------------------------------------------------------------- writing

    def write(self, data: bytes) -> None:
        """Put `data` here, in place of whatever was: a reader sees the old file or the new one."""
        if self.local:
            with replacing(self.url) as draft:
                draft.write_bytes(data)
        else:
            ask(self.url, lambda fs, path: fs.pipe_file(path, data))

    def write_json(self, value: Any) -> None:
        """Put a JSON value here, readable, in UTF-8."""
        self.write((json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())

    def create(self, data: bytes) -> bool:
        """Put `data` here unless there is something: of several writers one gets True, the others False and no change.

        On a disk a hard link decides, on an object store a conditional PUT.
        """
        if self.local:
            return create_whole(Path(self.url), data)
        try:
            ask(self.url, lambda fs, path: fs.pipe_file(path, data, mode="create"))
        except FileExistsError:
            return False
        return True

    @contextmanager
    def writing(self, suffix: str = "") -> Iterator[Path]:
        """Yield a local file to write; at the end of the block it is put here whole, after an error it is thrown away."""
        if self.local:
            with replacing(self.url, suffix) as draft:
                yield draft
            return
        with tempfile.TemporaryDirectory(prefix="loa-") as folder:
            draft = Path(folder) / f"{self.name}{suffix}"
            yield draft
            self.upload(draft)

    def upload(self, source: Path, last: Sequence[str] = ()) -> None:
        """Copy a local file or folder here. A file replaces what was there whole, by one PUT.

        A folder has no such moment on an object store, so name in `last` the files whose presence means that it is
        complete ("stage.json"): they are removed first and come back last.
        """
        source = Path(source)
        if not source.is_dir():
            if self.local:
                with replacing(self.url) as draft:
                    shutil.copyfile(source, draft)
            else:
                ask(self.url, lambda fs, path: fs.put_file(str(source), path))
            return
        if self.local:
            with whole_folder(self.path) as folder:
                shutil.copytree(source, folder, dirs_exist_ok=True)
            return
        names = sorted(file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file())
        for name in last:
            (self / name).remove()
        for name in set(self.tree()) - set(names):
            (self / name).remove()
        for name in sorted(names, key=lambda name: name in last):
            (self / name).upload(source / name)

    @contextmanager
    def writing_folder(self, last: Sequence[str] = (), continued: bool = False) -> Iterator[Path]:
        """Yield a local folder for a writer that needs one: itself where it is local; elsewhere `scratch`, which is put here at the end.

        Args:
            last: files whose presence means that the folder is complete, see `upload`.
            continued: begin with what an interrupted call has left on this machine, else with what is here. Otherwise the
                folder begins without anything, and after an error nothing stays.
        """
        if self.local:
            yield self.path
            return
        draft = self.scratch()
        if not continued:
            shutil.rmtree(draft, ignore_errors=True)
        elif not draft.exists() and self.exists():
            shutil.copytree(self.local_copy(), draft)
        try:
            yield draft
            self.upload(draft, last)
        except BaseException:
            if not continued:
                shutil.rmtree(draft, ignore_errors=True)
            raise
        shutil.rmtree(draft)

    def scratch(self) -> Path:
        """Where this machine keeps what is on its way to this folder; the folder itself where it is local."""
        return self.path if self.local else default_cache() / "drafts" / digest(self.url, 24) / self.name

    def remove(self) -> None:
        """Remove the file; one that is not there is no error."""
        if self.local:
            Path(self.url).unlink(missing_ok=True)
            return
        with suppress(FileNotFoundError):
            ask(self.url, lambda fs, path: fs.rm_file(path))

    def remove_tree(self) -> None:
        """Remove the folder with everything below it; one that is not there is no error."""
        if self.local:
            with suppress(FileNotFoundError):
                shutil.rmtree(self.url)
            return
        with suppress(FileNotFoundError):
            ask(self.url, lambda fs, path: fs.rm(path, recursive=True))

    # ----------------------------------------------------------------------------------------------------- copies

    def local_copy(self, cache: Path | None = None) -> Path:
        """It as a local file or folder, for libraries that need one: itself where it is local, else a copy in `cache`.

        A copy is named by the URL and by names, sizes and versions of the files, so a changed one is fetched anew.
        `cache` is by default `LOA_CACHE`, or `~/.cache/loa`. Raises FileNotFoundError when there is nothing.
        """
        if self.local:
            if not self.exists():
                raise FileNotFoundError(self.url)
            return Path(self.url)
        path = filesystem(self.url)[1]
        files = ask(self.url, lambda fs, path: fs.find(path, detail=True))  # of a file: itself
        if not files:
            raise FileNotFoundError(self.url)
        marks = ("size", "ETag", "etag", "mtime", "LastModified", "created")
        content = {name: [str(entry.get(mark, "")) for mark in marks] for name, entry in files.items()}
        folder = (cache or default_cache()) / digest([self.url, content], 24)
        copy = folder / self.name
        if not folder.exists():
            with whole_folder(folder) as draft:
                for name in files:
                    target = draft / self.name / name[len(path) :].lstrip("/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    ask(self.url, lambda fs, _, name=name, target=target: fs.get_file(name, str(target)))  # type: ignore[misc]
        return copy


def default_cache() -> Path:
    """Where local copies of remote files go: `LOA_CACHE`, or `~/.cache/loa`."""
    return Path(os.environ.get("LOA_CACHE") or Path.home() / ".cache" / "loa").absolute()
