"""VGGSound: `vggsound.csv` with a label per YouTube id and start, and the sound of each somewhere below."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.corpora.audioset import segment_names
from pipelines.corpora.files import AudioFiles, BadLine, csv_lines, hash_split, safe_id, split_named, tidy
from pipelines.corpora.records import Record, Recording

LAYOUT = "VGGSound (vggsound.csv with YouTube id, start seconds, label and split)"
LICENCE = "labels CC BY 4.0"
CORPUS = "vggsound"
TABLE = "vggsound.csv"
PUBLISHED_COUNTS = {"clips": 199_467}  # the release of 2020; the paper (arXiv 2004.14368) says "more than 200k"
CLIP_SECONDS = 10.0


def detect(root: Path) -> bool:
    """Whether the folder holds the table of VGGSound."""
    return (root / TABLE).is_file()


def read(root: Path, follow_links: bool = False) -> Iterator[Record]:
    """The clips with their label. The published splits are train and test: 5 % of train are validation, by a hash of their ids.

    Sound files are called `<id>_<start>` with six digits, as the authors' scripts do, or as in AudioSet.
    """
    table = root / TABLE
    files = AudioFiles(root, follow_links=follow_links)
    for line in csv_lines(table):
        if isinstance(line, BadLine):
            yield line.rejected(CORPUS)
            continue
        number, fields = line
        if fields[0].startswith("#"):
            continue
        try:
            video, label = fields[0], tidy(fields[2])
            start, split = float(fields[1]), split_named(fields[3])
            if len(fields) != 4 or not video or not label or split is None or not 0 <= start < float("inf"):
                raise ValueError
        except (ValueError, IndexError):
            yield BadLine(table, number, "expected YouTube id, start seconds, label, train or test").rejected(CORPUS)
            continue
        name = f"{video}_{round(start):06d}"
        recording_id = safe_id(name)
        yield files.found(
            Recording(
                CORPUS,
                recording_id,
                str(root / "audio" / name),
                start,
                CLIP_SECONDS,
                labels=(label,),
                split=hash_split(f"youtube:{video}", test=0.0) if split == "train" else split,
                licence=LICENCE,
                precut=True,
                origin=f"youtube:{video}",
            ),
            name,
            *segment_names(video, start, start + CLIP_SECONDS),
        )
    yield from files.unlisted(CORPUS)
