"""MusicCaps: `musiccaps-public.csv` with a caption per YouTube id. For evaluation alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.corpora.audioset import segment_names
from pipelines.corpora.csv_records import csv_records
from pipelines.corpora.files import AudioFiles, BadLine, safe_id, tidy
from pipelines.corpora.records import Record, Recording

LAYOUT = "MusicCaps (musiccaps-public.csv)"
LICENCE = "captions CC BY-SA 4.0"
CORPUS = "musiccaps"
TABLE = "musiccaps-public.csv"
EVALUATION_ONLY = True
PUBLISHED_COUNTS = {"clips": 5_521}  # arXiv 2301.11325, section 4: 2,858 of AudioSet's evaluation list, 2,663 of its training lists
COLUMNS = ("ytid", "start_s", "end_s", "caption")


def detect(root: Path) -> bool:
    """Whether the folder holds the table of MusicCaps."""
    return (root / TABLE).is_file()


def read(root: Path, follow_links: bool = False) -> Iterator[Record]:
    """The captioned clips, all of them test.

    Sound files are named as in AudioSet, or `[<id>]-[<start>-<end>]`.
    """
    table = root / TABLE
    files = AudioFiles(root, follow_links=follow_links)
    order: list[str] | None = None
    for record in csv_records(table):
        if isinstance(record, BadLine):
            yield record.rejected(CORPUS)
            continue
        number, fields = record
        if order is None:
            order = [name.strip() for name in fields]
            missing = [name for name in COLUMNS if name not in order]
            if missing:
                yield BadLine(table, number, f"the first line names {', '.join(order)}, not {', '.join(missing)}").rejected(CORPUS)
                return
            continue
        row = dict(zip(order, fields, strict=True))
        video, caption = row["ytid"], tidy(row["caption"])
        try:
            start, end = float(row["start_s"]), float(row["end_s"])
            if not video or not caption or not 0 <= start < end < float("inf"):
                raise ValueError
        except ValueError:
            yield BadLine(table, number, f"expected {', '.join(COLUMNS)}").rejected(CORPUS)
            continue
        recording_id = safe_id(video)
        yield files.found(
            Recording(
                CORPUS,
                recording_id,
                str(root / "audio" / video),
                start,
                end - start,
                captions=(caption,),
                split="test",
                licence=LICENCE,
                precut=True,
                origin=f"youtube:{video}",
            ),
            *segment_names(video, start, end),
            f"[{video}]-[{start:g}-{end:g}]",
        )
    yield from files.unlisted(CORPUS)
