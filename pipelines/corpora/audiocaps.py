"""AudioCaps: `train.csv`, `val.csv`, `test.csv` with captions, and the sound of each YouTube id somewhere below."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.corpora.audioset import segment_names
from pipelines.corpora.files import AudioFiles, BadLine, csv_lines, safe_id, tidy
from pipelines.corpora.records import Record, Recording

LAYOUT = "AudioCaps (train.csv, val.csv or test.csv with the columns youtube_id, start_time and caption)"
LICENCE = "captions MIT"
CORPUS = "audiocaps"
PUBLISHED_COUNTS = {"train": 49_838, "validation": 495, "test": 975}  # clips of the tables of AudioCaps 1.0
TABLES = {"train.csv": "train", "val.csv": "validation", "test.csv": "test"}
COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
CLIP_SECONDS = 10.0


@dataclass
class _Clip:
    caption_ids: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)


def detect(root: Path) -> bool:
    """Whether the folder holds a caption table of AudioCaps."""
    return any(_is_table(root / name) for name in TABLES)


def read(root: Path, follow_links: bool = False) -> Iterator[Record]:
    """The captioned clips, the captions of a clip together (validation and test have five).

    Sound files are named as in AudioSet, or by the id of one of their captions.
    """
    files = AudioFiles(root, follow_links=follow_links)
    for name, split in TABLES.items():
        table = root / name
        if not _is_table(table):
            continue
        clips: dict[tuple[str, float], _Clip] = {}
        order: list[str] | None = None
        for line in csv_lines(table):
            if isinstance(line, BadLine):
                yield line.rejected(CORPUS)
                continue
            number, fields = line
            if order is None:
                order = fields
                continue
            row = dict(zip(order, fields, strict=False))
            caption = tidy(row.get("caption", ""))
            try:
                start = float(row["start_time"])
                if len(fields) != len(order) or not row["youtube_id"] or not caption or not 0 <= start < float("inf"):
                    raise ValueError
            except (ValueError, KeyError):
                yield BadLine(table, number, f"expected {', '.join(COLUMNS)}").rejected(CORPUS)
                continue
            clip = clips.setdefault((row["youtube_id"], start), _Clip())
            clip.captions.append(caption)
            clip.caption_ids.append(row.get("audiocap_id", ""))
        for (video, start), clip in clips.items():
            recording_id = safe_id(f"{video}_{start:g}")
            yield files.found(
                Recording(
                    CORPUS,
                    recording_id,
                    str(root / "audio" / video),
                    start,
                    CLIP_SECONDS,
                    captions=tuple(dict.fromkeys(clip.captions)),
                    split=split,
                    licence=LICENCE,
                    precut=True,
                    origin=f"youtube:{video}",
                ),
                *segment_names(video, start, start + CLIP_SECONDS),
                *clip.caption_ids,
            )
    yield from files.unlisted(CORPUS)


def _is_table(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        header = stream.readline(4096).removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    return {"youtube_id", "start_time", "caption"} <= {name.strip(' \r\n"') for name in header.split(",")}
