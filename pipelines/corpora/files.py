"""What the readers share: sound files by name, tables and JSON read line by line, ids, and splits by hash."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipelines.corpora.records import Record, Recording, Rejected

# Everything that is evidently sound, also what cannot be decoded: that is rejected later with a reason, not overlooked.
AUDIO_SUFFIXES = frozenset(
    {
        ".wav",
        ".flac",
        ".ogg",
        ".oga",
        ".opus",
        ".mp3",
        ".aiff",
        ".aif",
        ".aifc",
        ".au",
        ".caf",
        ".w64",
        ".rf64",
        ".m4a",
        ".aac",
        ".mp4",
        ".webm",
        ".wma",
    }
)
MISSING = "missing file"
UNLISTED = "not listed"
MALFORMED = "malformed line"
SAME_NAME = "second file of a name"
OUTSIDE = "link out of the corpus"

_CHUNK = 1 << 20  # characters
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


# ---------------------------------------------------------------------------------------------------- sound files


class AudioFiles:
    """The sound files below some folders, found by name; knows which of them nobody asked for.

    Linked folders outside of `root` (of the first folder, by default) are not entered unless `follow_links` says so.
    """

    def __init__(self, *folders: Path, root: Path | None = None, follow_links: bool = False) -> None:
        self._paths: dict[str, str] = {}
        self._unclaimed: set[str] = set()
        self._same_name: list[str] = []
        self._outside: list[str] = []
        for folder in folders:
            for path in walk_audio(folder, root=root or folders[0], follow_links=follow_links, outside=self._outside):
                stem = os.path.basename(path).rpartition(".")[0]
                if stem in self._paths:
                    self._same_name.append(path)
                else:
                    self._paths[stem] = path
                    self._unclaimed.add(stem)

    def __len__(self) -> int:
        return len(self._paths)

    def find(self, *stems: str) -> str | None:
        """The first file called one of `stems`, whatever its suffix."""
        for stem in stems:
            if stem in self._paths:
                self._unclaimed.discard(stem)
                return self._paths[stem]
        return None

    def found(self, recording: Recording, *stems: str) -> Record:
        """`recording` in the first file called one of `stems`; rejected as missing, at the path it came with, where there is none."""
        path = self.find(*stems)
        return recording.rejected(MISSING) if path is None else replace(recording, path=path)

    def unlisted(self, corpus: str) -> Iterator[Rejected]:
        """The files that `find` never returned, and the linked folders that were not entered."""
        for stem in sorted(self._unclaimed):
            yield Rejected(corpus, printable(self._paths[stem]), "", f"{UNLISTED}: the metadata of {corpus} does not name this file")
        for path in self._same_name:
            first = self._paths[os.path.basename(path).rpartition(".")[0]]
            yield Rejected(corpus, printable(path), "", f"{SAME_NAME}: the metadata name files without suffix, and {first} came first")
        for path in self._outside:
            yield link_outside(corpus, path)


def walk_audio(
    folder: Path,
    skip: Iterable[Path] = (),
    root: Path | None = None,
    follow_links: bool = True,
    outside: list[str] | None = None,
    wanted: Callable[[str], bool] | None = None,
) -> Iterator[str]:
    """Absolute paths of the sound files below `folder`, sorted by name in every folder. Links never lead in circles.

    Args:
        skip: folders to leave out.
        root: without `follow_links`, linked folders outside of it are not entered; `folder` by default.
        outside: collects these linked folders.
        wanted: which names to yield instead of those of sound files.
    """
    seen = {os.path.realpath(path) for path in skip}
    base = os.path.realpath(root or folder)
    waiting = [os.path.abspath(folder)]
    while waiting:
        current = waiting.pop()
        real = os.path.realpath(current)
        if real in seen:
            continue
        if not follow_links and not _below(base, real):
            if outside is not None:
                outside.append(current)
            continue
        seen.add(real)
        try:
            with os.scandir(current) as entries:
                listing = sorted(entries, key=lambda entry: entry.name)
        except OSError:  # vanished, or not ours to read: nothing of it can be listed
            continue
        for entry in listing:
            if not entry.name.startswith(".") and (wanted or is_audio)(entry.name) and entry.is_file():
                yield entry.path
        waiting += [entry.path for entry in reversed(listing) if entry.is_dir() and not entry.name.startswith(".")]


def is_audio(name: str) -> bool:
    """Whether a file of this name is sound."""
    return os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES


class Links:
    """Whether paths lead out of a folder by symbolic links."""

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        self._folders: dict[str, bool] = {}  # thousands of recordings share a folder

    def lead_outside(self, path: str) -> bool:
        """Whether the file of `path` lies outside of the folder once all links are followed."""
        folder = os.path.dirname(path)
        if folder not in self._folders:
            self._folders[folder] = not _below(self._root, os.path.realpath(folder))
        if os.path.islink(path):
            return not _below(self._root, os.path.realpath(path))
        return self._folders[folder]


def _below(base: str, path: str) -> bool:
    return path == base or path.startswith(base.rstrip(os.sep) + os.sep)


def link_outside(corpus: str, path: str, clip_id: str = "") -> Rejected:
    """A link that leads out of its corpus, as a row of the rejected table."""
    reason = f"{OUTSIDE}: it leads to {printable(os.path.realpath(path))}; --follow-links takes it along"
    return Rejected(corpus, printable(path), clip_id, reason)


def inside(folder: Path, relative: str) -> str | None:
    """`folder`/`relative` as an absolute path, or None when it would leave the folder."""
    base = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(base, relative))
    return path if path.startswith(base + os.sep) else None


# ----------------------------------------------------------------------------------------------------------- lines


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line (or entry) of a metadata file that cannot be understood."""

    path: Path
    number: int
    problem: str

    def rejected(self, corpus: str) -> Rejected:
        """The line as a row of the rejected table."""
        return Rejected(corpus, printable(str(self.path)), "", f"{MALFORMED}: line {self.number}: {self.problem}")


def csv_lines(
    path: Path, delimiter: str = ",", quoted: bool = True, any_encoding: bool = False
) -> Iterator[tuple[int, list[str]] | BadLine]:
    """(line number, fields) of every line that is not blank. A row never spans lines, so one bad quote costs one row."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    for number, line in text_lines(path, any_encoding):
        if isinstance(line, BadLine):
            yield line
            continue
        try:
            yield number, next(csv.reader([line], delimiter=delimiter, quoting=quoting, skipinitialspace=True, strict=quoted))
        except csv.Error as error:
            yield BadLine(path, number, str(error))


def json_lines(path: Path, any_encoding: bool = False) -> Iterator[tuple[int, dict[str, Any]] | BadLine]:
    """(line number, object) of a JSON-lines file."""
    for number, line in text_lines(path, any_encoding):
        if isinstance(line, BadLine):
            yield line
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield BadLine(path, number, f"not JSON ({error})")
            continue
        yield (number, value) if isinstance(value, dict) else BadLine(path, number, "not a JSON object")


def text_lines(path: Path, any_encoding: bool = False) -> Iterator[tuple[int, str | BadLine]]:
    """(line number, text) of every line of a UTF-8 file that is not blank; with `any_encoding`, of one that `decode` reads."""
    with path.open("rb") as stream:
        if any_encoding and (wide := _wide_encoding(stream.read(64))):
            for number, line in enumerate(path.read_bytes().decode(wide, "replace").splitlines(), 1):
                if line.strip():
                    yield number, line
            return
        stream.seek(0)
        for number, raw in enumerate(stream, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                yield number, raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                bad = BadLine(path, number, f"not UTF-8 ({error.reason})")
                yield number, decode(raw).rstrip("\r\n") if any_encoding else bad


def decode(data: bytes) -> str:
    """The text of a file as people's programs save it: UTF-8, UTF-16 and UTF-32, else Windows-1252. Never fails."""
    if wide := _wide_encoding(data[:64]):
        return data.decode(wide, "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _wide_encoding(head: bytes) -> str | None:
    """The encoding of a file of 16- or 32-bit characters, by its byte order mark or by the zeros of Latin letters."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) * 2 > len(head) // 2:
        return "utf-16-le" if odd > even else "utf-16-be"
    return None


def json_entries(path: Path, key: str) -> Iterator[tuple[int, dict[str, Any]] | BadLine]:
    """(line number, object) of every object in the array `key` of a JSON file, or in the file's own array.

    The file is read piece by piece, since GigaSpeech.json is larger than most memories, and the entries before a
    damaged one are kept.
    """
    opening = re.compile(rf'\A\s*\[|"{re.escape(key)}"\s*:\s*\[')
    gap = re.compile(r"[\s,]*")
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig", errors="replace") as stream:
        text, position, line, reach = "", 0, 1, _CHUNK

        def grow() -> bool:
            nonlocal text, position
            piece = stream.read(reach)
            text, position = text[position:] + piece, 0
            return bool(piece)

        while (start := opening.search(text)) is None:
            if not grow():
                yield BadLine(path, line, f'there is no array "{key}"')
                return
        passed = start.end()
        while True:
            passed = gap.match(text, passed).end()  # type: ignore[union-attr]
            line += text.count("\n", position, passed)
            position = passed
            if text.startswith("]", position):
                return
            try:
                value, passed = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                reach *= 2  # an entry that is not yet read to its end: few, long reads
                if grow():
                    passed = position
                    continue
                at = line + text.count("\n", position, getattr(error, "pos", position))
                yield BadLine(path, at, f"not JSON ({getattr(error, 'msg', error)}); what follows is not read")
                return
            reach = _CHUNK
            yield (line, value) if isinstance(value, dict) else BadLine(path, line, "not a JSON object")


def read_json(path: Path) -> Any:
    """The value of a small JSON file. Raises ValueError, whose text names the line, for anything else."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from None
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None


# ------------------------------------------------------------------------------------------------------ small things


def tidy(text: Any) -> str:
    """Text on one line and storable as UTF-8; numbers become text, anything else becomes ""."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(text, str):
        return ""
    return " ".join(printable(text).split())


def texts(value: Any) -> tuple[str, ...]:
    """One text or a list of them as a tuple of tidy texts, each once and none empty."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(dict.fromkeys(filter(None, map(tidy, values))))


def printable(path: str) -> str:
    """A name as UTF-8, also one that is not (undecodable bytes become question marks)."""
    return path.encode("utf-8", "replace").decode("utf-8").replace("\x00", "?")


def safe_id(name: str) -> str:
    """`name` fit for a clip id. A changed name gets a checksum, so different names stay different."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    if safe == name and name:
        return name
    return f"{safe.strip('_')}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}".lstrip("-")


def hash_split(recording_id: str, validation: float = 0.05, test: float = 0.05) -> str:
    """The split of a recording whose corpus has none: by a hash of its id, so it never depends on the other ones."""
    share = int.from_bytes(hashlib.sha256(recording_id.encode()).digest()[:8]) / 2**64
    if share < test:
        return "test"
    return "validation" if share < test + validation else "train"


def split_named(name: str) -> str | None:
    """The split that goes by `name` ("val", "dev", "eval", …), or None."""
    return _SPLIT_NAMES.get(name.strip().lower())
