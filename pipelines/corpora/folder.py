"""A person's own sound: any folder of recordings, with captions in a table, in text files beside them, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.corpora.files import (
    MISSING,
    BadLine,
    csv_lines,
    hash_split,
    inside,
    is_audio,
    json_lines,
    printable,
    safe_id,
    split_named,
    texts,
    tidy,
    walk_audio,
)
from pipelines.corpora.records import Record, Recording, Rejected

LAYOUT = "a folder of recordings (with captions.csv, captions.jsonl, metadata.csv or metadata.jsonl, or a .txt per recording)"
CORPUS = "folder"
TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
# Columns by the names people give them; the first is the one the documentation names.
COLUMNS = {
    "file": ("file", "file_name", "filename", "path", "audio"),
    "caption": ("caption", "captions", "text", "description"),
    "label": ("label", "labels", "tags"),
    "transcript": ("transcript", "transcription"),
    "split": ("split",),
    "licence": ("licence", "license"),
}


@dataclass
class _Notes:
    """What the tables say of one recording."""

    captions: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    transcript: str = ""
    split: str = ""
    licence: str = ""


def detect(root: Path, skip: Iterable[Path] = ()) -> bool:
    """Whether there is any sound below the folder, or a table that promises some."""
    return next(walk_audio(root, skip), None) is not None or any((root / name).is_file() for name in TABLES)


def read(root: Path, skip: Iterable[Path] = ()) -> Iterator[Record]:
    """Every recording below `root` but below `skip`.

    A table names files relative to its own folder; several rows of one file give it several captions, and several
    labels are parted by ";". A recording without any text is kept: the stages that need none train on it. Splits come from
    the table, else from a hash of the file's place below `root`.
    """
    root = Path(os.path.abspath(root))
    notes: dict[str, _Notes] = {}
    recordings = list(walk_audio(root, skip))
    for folder in sorted({str(root), *map(os.path.dirname, recordings)}):
        for name in TABLES:
            table = Path(folder) / name
            if table.is_file():
                yield from _read_table(table, notes)
    for path in sorted(notes.keys() - set(recordings)):
        exists = os.path.isfile(path)
        reason = f"unreadable: {Path(path).suffix or 'a file without suffix'} is no sound file" if exists else MISSING
        yield Rejected(CORPUS, printable(path), "", reason)
    for path in recordings:
        relative = os.path.relpath(path, root)
        recording_id = safe_id(f"{root.name}_{relative.rpartition('.')[0]}")
        if printable(path) != path:
            yield Rejected(CORPUS, printable(path), f"{CORPUS}-{recording_id}", "unreadable: its name is not UTF-8; rename it")
            continue
        note = notes.get(path, _Notes())
        captions = note.captions or _sidecar(Path(path))
        yield Recording(
            CORPUS,
            recording_id,
            path,
            captions=tuple(dict.fromkeys(captions)),
            transcript=note.transcript,
            labels=tuple(dict.fromkeys(note.labels)),
            split=note.split or hash_split(recording_id),
            licence=note.licence,
        )


def _read_table(table: Path, notes: dict[str, _Notes]) -> Iterator[Rejected]:
    for line in json_lines(table) if table.suffix == ".jsonl" else _csv_objects(table):
        if isinstance(line, BadLine):
            yield line.rejected(CORPUS)
            continue
        number, row = line
        cells = {column: next((row[name] for name in names if row.get(name)), "") for column, names in COLUMNS.items()}
        path = inside(table.parent, tidy(cells["file"])) if cells["file"] else None
        split = split_named(tidy(cells["split"])) if cells["split"] else ""
        if path is None or split is None:
            problem = f"unknown split {tidy(cells['split'])!r}" if path else "no file of this folder is named"
            yield BadLine(table, number, problem).rejected(CORPUS)
            continue
        note = notes.setdefault(path, _Notes())
        note.captions += texts(cells["caption"])
        labels = cells["label"]
        note.labels += texts(labels.split(";") if isinstance(labels, str) else labels)
        note.transcript = tidy(cells["transcript"]) or note.transcript
        note.split = split or note.split
        note.licence = tidy(cells["licence"]) or note.licence


def _csv_objects(table: Path) -> Iterator[tuple[int, dict[str, Any]] | BadLine]:
    header: list[str] | None = None
    for line in csv_lines(table):
        if isinstance(line, BadLine):
            yield line
        elif header is None:
            header = [name.strip().lower() for name in line[1]]
            if not set(COLUMNS["file"]) & set(header):
                yield BadLine(table, line[0], "the first line must name the columns, one of them `file`")
                return
        elif len(line[1]) != len(header):
            yield BadLine(table, line[0], f"{len(line[1])} fields where the first line names {len(header)}")
        else:
            yield line[0], dict(zip(header, line[1], strict=True))


def _sidecar(path: Path) -> list[str]:
    """The captions of a text file beside a recording, one per line."""
    text = path.with_suffix(".txt")
    if not text.is_file() or is_audio(text.name):
        return []
    lines = text.read_bytes().decode("utf-8-sig", "replace").splitlines()
    return [caption for caption in map(tidy, lines) if caption]
