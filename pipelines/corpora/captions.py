"""Tables that say what is heard in the recordings of a folder, as people really write them.

CSV with commas, semicolons, tabs or bars, with or without a header, in UTF-8, UTF-16 or Windows-1252; JSON and JSON lines;
a text or JSON file beside each recording. A table that names none of the recordings is reported with what it holds.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.corpora.files import (
    BadLine,
    csv_lines,
    decode,
    inside,
    is_audio,
    json_lines,
    printable,
    split_named,
    text_lines,
    texts,
    tidy,
)
from pipelines.corpora.records import CAPTION_TABLE, Rejected

CORPUS = "folder"
STEMS = ("captions", "metadata")
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
# Columns by the names people give them; the first is the one the documentation names.
COLUMNS = {
    "file": (
        "file",
        "file_name",
        "filename",
        "path",
        "audio",
        "audio_file",
        "audio_path",
        "audio_filename",
        "filepath",
        "file_path",
        "wav",
    ),
    "caption": ("caption", "captions", "text", "description"),
    "label": ("label", "labels", "tags", "tag", "class", "category"),
    "transcript": ("transcript", "transcription"),
    "split": ("split",),
    "licence": ("licence", "license"),
}
WORDS = ("caption", "label", "transcript")
_DELIMITERS = (",", ";", "\t", "|")
_NUMBERED = re.compile(r"captions?_?\d+")  # caption_1 … caption_5, as Clotho has them

Cells = dict[str, Any]  # a row by the keys of COLUMNS


class _NotATable(Exception):
    """A file that holds no captions; says what it holds."""


@dataclass
class Notes:
    """What the tables say of one recording."""

    captions: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    transcript: str = ""
    split: str = ""
    licence: str = ""

    def add(self, cells: Mapping[str, Any]) -> bool:
        """Take in a row; returns whether it has any words."""
        labels = cells.get("label")
        captions, labels = texts(cells.get("caption")), texts(re.split("[;|]", labels) if isinstance(labels, str) else labels)
        transcript = tidy(cells.get("transcript"))
        self.captions += captions
        self.labels += labels
        self.transcript = transcript or self.transcript
        self.split = split_named(tidy(cells.get("split"))) or self.split
        self.licence = tidy(cells.get("licence")) or self.licence
        return bool(captions or labels or transcript)


class Sounds:
    """The recordings of a folder by the names that tables use: with or without suffix, with more or fewer of their folders."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = set(paths)
        self._by_stem: dict[str, list[str]] = {}
        for path in sorted(self.paths):
            self._by_stem.setdefault(os.path.basename(_bare(path)), []).append(path)

    def find(self, folder: Path, name: str) -> list[str]:
        """The recordings below `folder` that `name` may mean, the best matches alone. Several are ambiguous, unless only
        their suffixes differ."""
        path = inside(folder, name)
        if path in self.paths:
            return [path]
        name = name.replace("\\", "/").removeprefix("./")
        wanted = _bare(name)
        if ".." in wanted.split("/"):
            return []
        found = {}
        for candidate in self._by_stem.get(os.path.basename(wanted), []):
            relative = _bare(os.path.relpath(candidate, folder))
            if not relative.startswith("../") and (_ends_with(relative, wanted) or _ends_with(wanted, relative)):
                found[candidate] = relative
        exact = [candidate for candidate, relative in found.items() if relative == wanted] or list(found)
        return [candidate for candidate in exact if os.path.basename(candidate) == os.path.basename(name)] or exact


def is_table(name: str) -> bool:
    """Whether a file of this name may be a table of captions: its columns decide."""
    stem, suffix = os.path.splitext(name.lower())
    return suffix in SUFFIXES or (suffix == ".txt" and stem in STEMS)


def read_table(table: Path, root: Path, sounds: Sounds, notes: dict[str, Notes]) -> Iterator[Rejected]:
    """Take a table's rows into `notes`, by path of the recording; yields what cannot be used, with its line.

    Names are looked up below the table's folder, then below `root`. A name of no recording is noted under the path that it
    would have, so that the caller can tell it missing.
    """
    rows = matched = 0
    unmatched = ""
    try:
        for row in _rows(table, sounds):
            if isinstance(row, BadLine):
                yield row.rejected(CORPUS)
                continue
            number, cells = row
            rows += 1
            name, split = tidy(cells.get("file")), tidy(cells.get("split"))
            paths = (sounds.find(table.parent, name) or sounds.find(root, name)) if name else []
            matched += bool(paths)
            unmatched = unmatched or ("" if paths else name)
            expected = inside(table.parent, name) if name and not paths else None
            problem = None
            if len({_bare(path) for path in paths}) > 1:
                problem = f"{name!r} may mean {paths[0]} or {paths[1]}"
            elif not paths and expected is None:
                problem = "no file of this folder is named"
            elif split and split_named(split) is None:
                problem = f"unknown split {split!r}"
            if problem:
                yield BadLine(table, number, problem).rejected(CORPUS)
                continue
            for path in [*paths, *([expected] if expected else [])]:
                worded = notes.setdefault(path, Notes()).add(cells)
                if not worded and paths and any(word in cells for word in WORDS):
                    yield Rejected(CORPUS, printable(path), "", f"empty caption: line {number} of {printable(table.name)}")
    except _NotATable as problem:
        yield _reported(table, str(problem))
    if rows and not matched:
        yield _reported(table, f"none of its {rows:,} rows names a recording{f'; the first names {unmatched!r}' if unmatched else ''}")


def sidecar(path: Path) -> Notes:
    """What a file beside a recording says of it: captions in `x.txt`, one per line, or the fields of an object in `x.json`."""
    notes = Notes()
    text, entry = path.with_suffix(".txt"), path.with_suffix(".json")
    if text.is_file():
        notes.captions += filter(None, map(tidy, decode(text.read_bytes()).splitlines()))
    if entry.is_file():
        try:
            value = json.loads(decode(entry.read_bytes()))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            notes.add(_known_columns(value))
    return notes


def is_sidecar(table: Path, sounds: Sounds) -> bool:
    """Whether a text or JSON file belongs to the recording of its name beside it."""
    beside = sounds.find(table.parent, table.stem) if table.suffix.lower() in (".txt", ".json") else []
    return any(os.path.dirname(path) == str(table.parent) for path in beside)


# ------------------------------------------------------------------------------------------------------ the forms


def _rows(table: Path, sounds: Sounds) -> Iterator[tuple[int, Cells] | BadLine]:
    """(line number, cells) of every row. Raises _NotATable when the columns do not fit."""
    suffix = table.suffix.lower()
    if suffix not in (".json", ".jsonl"):
        yield from _csv_rows(table, sounds)
        return
    begun = False
    for line in _json_objects(table) if suffix == ".json" else json_lines(table, any_encoding=True):
        if isinstance(line, BadLine):
            yield line
            continue
        cells = _known_columns(line[1])
        if not begun:
            _require_columns(cells, [str(name) for name in line[1]])
            begun = True
        yield line[0], cells


def _csv_rows(table: Path, sounds: Sounds) -> Iterator[tuple[int, Cells] | BadLine]:
    first = next((line for _, line in text_lines(table, any_encoding=True) if isinstance(line, str)), "")
    headers = {delimiter: next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [""]) for delimiter in _DELIMITERS}
    named = next((d for d, cells in headers.items() if "file" in _known_columns(dict.fromkeys(cells, ""))), None)
    bare = next((d for d, cells in headers.items() if len(cells) > 1 and sounds.find(table.parent, cells[0])), None)
    without_header = named is None and bare is not None
    delimiter = named or bare or max(_DELIMITERS, key=lambda d: len(headers[d]))
    header = headers[delimiter]
    if not without_header:
        _require_columns(_known_columns(dict.fromkeys(header, "")), header)
    for position, line in enumerate(csv_lines(table, delimiter, any_encoding=True)):
        if isinstance(line, BadLine):
            yield line
        elif without_header:
            yield line[0], {"file": line[1][0], "caption": f"{delimiter} ".join(line[1][1:])}
        elif position == 0:
            continue
        elif len(line[1]) != len(header):
            yield BadLine(table, line[0], f"{len(line[1])} fields where the first line names {len(header)}")
        else:
            yield line[0], _known_columns(dict(zip(header, line[1], strict=True)))


def _json_objects(table: Path) -> Iterator[tuple[int, dict[str, Any]] | BadLine]:
    """(number, object) of an array of objects, of the one such array in an object, or of an object by the names of recordings."""
    try:
        value = json.loads(decode(table.read_bytes()))
    except (ValueError, RecursionError) as error:
        yield BadLine(table, getattr(error, "lineno", 1), f"not JSON ({getattr(error, 'msg', error)})")
        return
    if isinstance(value, dict):
        arrays = [entry for entry in value.values() if isinstance(entry, list) and any(isinstance(item, dict) for item in entry)]
        if len(arrays) == 1:
            value = arrays[0]
        else:
            value = [{"file": name, **(entry if isinstance(entry, dict) else {"caption": entry})} for name, entry in value.items()]
    if not isinstance(value, list):
        raise _NotATable("it holds a single value; expected an array of objects")
    for number, entry in enumerate(value, 1):
        yield (number, entry) if isinstance(entry, dict) else BadLine(table, number, "not a JSON object")


def _known_columns(row: Mapping[Any, Any]) -> Cells:
    """A row under the names of COLUMNS, its unknown columns left out; of two names for one thing the more usual counts."""
    named = {re.sub(r"[\s-]+", "_", str(name).strip(' "\ufeff').casefold()): value for name, value in row.items()}
    cells = {}
    for column, names in COLUMNS.items():
        if present := [name for name in names if name in named]:
            cells[column] = next((named[name] for name in present if named[name]), "")
    numbered = [value for name, value in named.items() if _NUMBERED.fullmatch(name)]
    return cells | {"caption": [*texts(cells.get("caption")), *numbered]} if numbered else cells


def _require_columns(cells: Cells, seen: Iterable[str]) -> None:
    if "file" not in cells or len(cells) < 2:
        raise _NotATable(
            f"its columns are {', '.join(printable(name) for name in seen) or 'none'}; expected one that names the recording "
            f"({', '.join(COLUMNS['file'][:4])}) and at least one of {', '.join(column for column in COLUMNS if column != 'file')}"
        )


def _reported(table: Path, problem: str) -> Rejected:
    return Rejected(CORPUS, printable(str(table)), "", f"{CAPTION_TABLE}: {problem}")


def _bare(path: str) -> str:
    """A path without the suffix of a sound file, in lower case."""
    return (path.rpartition(".")[0] if is_audio(path) else path).casefold()


def _ends_with(path: str, end: str) -> bool:
    return f"/{path}".endswith(f"/{end.lstrip('/')}")
