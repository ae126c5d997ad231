"""The Free Music Archive: `fma_metadata/tracks.csv`, and `fma_full/`, `fma_large/`, … with `000/000002.mp3`. Read only when asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipelines.corpora.csv_records import csv_records
from pipelines.corpora.files import MISSING, AudioFiles, BadLine, split_named, tidy
from pipelines.corpora.records import Record, Recording, Rejected

LAYOUT = "FMA (fma_metadata/tracks.csv beside fma_full/, fma_large/, fma_medium/ or fma_small/)"
LICENCE = "FMA, licence of the track not stated"
CORPUS = "fma"
OPT_IN = True
PUBLISHED_COUNTS = {"tracks": 106_574}  # arXiv 1612.01840, table 2: full and large; medium has 25,000 and small 8,000
SUBSETS = {"small": ("small",), "medium": ("small", "medium"), "large": ("small", "medium", "large"), "full": ("small", "medium", "large")}
COLUMNS = (("set", "split"), ("set", "subset"), ("track", "genre_top"), ("track", "genres"), ("track", "license"))


def detect(root: Path) -> bool:
    """Whether the folder holds the metadata of FMA."""
    return (root / "fma_metadata" / "tracks.csv").is_file()


def read(root: Path, follow_links: bool = False) -> Iterator[Record]:
    """The tracks of the largest subset whose folder is there, with their genres, each under its own licence.

    The splits are the published ones, which keep an artist's tracks together.
    """
    table = root / "fma_metadata" / "tracks.csv"
    folders = {name: root / f"fma_{name}" for name in SUBSETS if (root / f"fma_{name}").is_dir()}
    files = AudioFiles(*folders.values(), root=root, follow_links=follow_links)
    listed = {subset for name in folders or SUBSETS for subset in SUBSETS[name]}
    genres: dict[str, str] = {}
    for genre in _genres(table.with_name("genres.csv")):
        if isinstance(genre, Rejected):
            yield genre
        else:
            genres[genre[0]] = genre[1]
    for row in _rows(table):
        if isinstance(row, BadLine):
            yield row.rejected(CORPUS)
        elif row["set", "subset"] in listed:
            yield _recording(root, row, files, genres)
    yield from files.unlisted(CORPUS)


Row = Mapping[tuple[str, str], str]


def _recording(root: Path, row: Row, files: AudioFiles, genres: Mapping[str, str]) -> Record:
    name = f"{int(row['track', 'track_id']):06d}"
    labels = [row["track", "genre_top"], *(genres.get(number, "") for number in re.findall(r"\d+", row["track", "genres"]))]
    return files.found(
        Recording(
            CORPUS,
            name,
            str(root / "fma_full" / name[:3] / f"{name}.mp3"),
            labels=tuple(dict.fromkeys(filter(None, map(tidy, labels)))),
            split=split_named(row["set", "split"]) or "train",
            licence=tidy(row["track", "license"]) or LICENCE,
            origin=f"{CORPUS}:{name}",
        ),
        name,
    )


def _rows(table: Path) -> Iterator[Row | BadLine]:
    """The tracks of the table. Its head has three lines: groups of columns, columns, and `track_id` alone."""
    groups: list[str] = []
    order: list[tuple[str, str]] = []
    for record in csv_records(table):
        if isinstance(record, BadLine):
            yield record
            continue
        number, fields = record
        if not groups:
            groups = [name.strip() for name in fields]
            continue
        if not order:
            order = list(zip(groups, (name.strip() for name in fields), strict=True))
            order[0] = ("track", "track_id")
            missing = [" ".join(column) for column in COLUMNS if column not in order]
            if missing:
                yield BadLine(table, number, f"the first two lines do not name the columns {', '.join(missing)}")
                return
            continue
        row = dict(zip(order, fields, strict=True))
        track, split = row["track", "track_id"], row["set", "split"]
        if track == "track_id":
            continue
        if not (track.isascii() and track.isdigit() and len(track) < 10) or split_named(split) is None:
            yield BadLine(table, number, f"expected a track's number and its split, not {tidy(track)[:20]!r} and {tidy(split)[:20]!r}")
            continue
        yield row


def _genres(table: Path) -> Iterator[tuple[str, str] | Rejected]:
    """(number, title) of every genre."""
    if not table.is_file():
        yield Rejected(CORPUS, str(table), "", f"{MISSING}: without the table of genres a track has its top genre alone")
        return
    order: list[str] | None = None
    for record in csv_records(table):
        if isinstance(record, BadLine):
            yield record.rejected(CORPUS)
        elif order is None:
            order = record[1]
            if not {"genre_id", "title"} <= set(order):
                yield BadLine(table, record[0], "the first line does not name genre_id and title").rejected(CORPUS)
                return
        else:
            row = dict(zip(order, record[1], strict=True))
            yield row["genre_id"], row["title"]
