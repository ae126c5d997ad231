"""Clotho: `clotho_captions_<split>.csv` with five captions per recording, `clotho_metadata_<split>.csv`. For evaluation alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pipelines.corpora.csv_records import csv_records
from pipelines.corpora.files import MISSING, AudioFiles, BadLine, safe_id, texts, tidy
from pipelines.corpora.records import Record, Recording, Rejected

LAYOUT = "Clotho (clotho_captions_development.csv, _validation.csv or _evaluation.csv beside development/, validation/, evaluation/)"
LICENCE = "captions: Tampere University, non-commercial"
CORPUS = "clotho"
EVALUATION_ONLY = True
PUBLISHED_COUNTS = {"development": 3_839, "validation": 1_045, "evaluation": 1_045}  # lines of the tables of version 2.1, zenodo 4783391
SPLITS = {"development": "validation", "validation": "validation", "evaluation": "test"}


def detect(root: Path) -> bool:
    """Whether the folder holds caption tables of Clotho."""
    return any(_table(root, "captions", name) is not None for name in SPLITS)


def read(root: Path, follow_links: bool = False) -> Iterator[Record]:
    """The recordings with their captions and each one's own licence.

    Clotho's evaluation split is test, as in published scores. Its development and validation splits are held out, too.
    """
    for name, split in SPLITS.items():
        table = _table(root, "captions", name)
        if table is None:
            continue
        facts: dict[str, Mapping[str, str]] = {}
        metadata = _table(root, "metadata", name)
        if metadata is None:
            missing = str(table.with_name(f"clotho_metadata_{name}.csv"))
            yield Rejected(CORPUS, missing, "", f"{MISSING}: without the metadata no recording has its licence")
        else:
            for row in _rows(metadata, ("file_name", "sound_id", "license")):
                if isinstance(row, BadLine):
                    yield row.rejected(CORPUS)
                else:
                    facts[row["file_name"]] = row
        files = AudioFiles(*_audio_folders(root, name), root=root, follow_links=follow_links)
        for row in _rows(table, ("file_name",)):
            yield row.rejected(CORPUS) if isinstance(row, BadLine) else _recording(root, name, split, row, files, facts)
        yield from files.unlisted(CORPUS)


def _recording(
    root: Path, name: str, split: str, row: Mapping[str, str], files: AudioFiles, facts: Mapping[str, Mapping[str, str]]
) -> Record:
    file = row["file_name"].strip()
    recording_id = safe_id(f"{name}_{_stem(file)}")
    fact = facts.get(row["file_name"], {})
    sound = fact.get("sound_id", "").strip()
    return files.found(
        Recording(
            CORPUS,
            recording_id,
            str(root / name / file),
            captions=texts([value for column, value in row.items() if column.startswith("caption_")]),
            split=split,
            licence=tidy(fact.get("license", "")) or LICENCE,
            origin=f"freesound:{sound}" if sound.isdigit() else "",
        ),
        _stem(file),
    )


def _rows(table: Path, needed: tuple[str, ...]) -> Iterator[dict[str, str] | BadLine]:
    """The lines of a table by column. The metadata's names are Latin-1."""
    order: list[str] | None = None
    for record in csv_records(table, fallback="latin-1"):
        if isinstance(record, BadLine):
            yield record
            continue
        number, fields = record
        if order is not None:
            row = dict(zip(order, fields, strict=True))
            yield row if row["file_name"].strip() else BadLine(table, number, "no file_name")
            continue
        order = [name.strip() for name in fields]
        missing = [name for name in needed if name not in order]
        if missing:
            yield BadLine(table, number, f"the first line names {', '.join(order)}, not {', '.join(missing)}")
            return


def _table(root: Path, kind: str, name: str) -> Path | None:
    candidates = [folder / f"clotho_{kind}_{name}.csv" for folder in (root, root / "clotho_csv_files")]
    return next((path for path in candidates if path.is_file()), None)


def _audio_folders(root: Path, name: str) -> list[Path]:
    """Where the recordings of a split lie: as the archives unpack, or in a folder called like their archive."""
    folders = [base / folder for base in (root, root / "clotho_audio_files") for folder in (name, f"clotho_audio_{name}")]
    return [folder for folder in folders if folder.is_dir()]


def _stem(file: str) -> str:
    return file.rpartition(".")[0] or file
