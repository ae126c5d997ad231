"""AudioSet: `*_segments.csv`, `class_labels_indices.csv`, and the sound of each YouTube id somewhere below."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.corpora.files import MISSING, AudioFiles, BadLine, csv_lines, hash_split, safe_id, tidy
from pipelines.corpora.records import Record, Recording, Rejected

LAYOUT = "AudioSet (balanced_train_, unbalanced_train_ or eval_segments.csv beside class_labels_indices.csv)"
LICENCE = "labels CC BY 4.0"
CORPUS = "audioset"
PUBLISHED_COUNTS = {"evaluation": 20_371, "balanced": 22_160, "unbalanced": 2_041_789}  # lines of the segment lists
CLASSES = "class_labels_indices.csv"


def detect(root: Path) -> bool:
    """Whether the folder holds segment lists of AudioSet."""
    return any(root.glob("*_segments.csv"))


def read(root: Path, follow_links: bool = False) -> Iterator[Record]:
    """The segments of every list: `eval_segments.csv` is the test split, all others are training.

    AudioSet has no validation split: 5 % of the balanced training list are held out for it, by a hash of the video's id.
    Sound files are called `<id>`, `Y<id>`, `<id>_<start>` or `<id>_<start>_<end>` (seconds or milliseconds), with any
    suffix. They hold the segment alone, or the whole video. Labels that the class table does not know are left out.
    """
    names: dict[str, str] = {}
    if (root / CLASSES).is_file():
        for line in csv_lines(root / CLASSES):
            if isinstance(line, BadLine):
                yield line.rejected(CORPUS)
            elif len(line[1]) == 3 and line[1][0] != "index":
                names[line[1][1]] = tidy(line[1][2])
    else:
        yield Rejected(CORPUS, str(root / CLASSES), "", f"{MISSING}: without the class table no recording has labels")
    files = AudioFiles(root, follow_links=follow_links)
    for table in sorted(root.glob("*_segments.csv")):
        for line in csv_lines(table):
            if isinstance(line, BadLine):
                yield line.rejected(CORPUS)
                continue
            number, fields = line
            if fields[0].startswith("#") or fields[0] == "YTID":
                continue
            try:
                video, start, end = fields[0], float(fields[1]), float(fields[2])
                mids = ",".join(fields[3:]).split(",")
                if not video or not 0 <= start < end < float("inf"):
                    raise ValueError
            except (ValueError, IndexError):
                yield BadLine(table, number, "expected YTID, start_seconds, end_seconds, positive_labels").rejected(CORPUS)
                continue
            labels = tuple(dict.fromkeys(names[mid.strip()] for mid in mids if mid.strip() in names))
            yield files.found(
                Recording(
                    CORPUS,
                    safe_id(video),
                    str(root / "audio" / video),
                    start,
                    end - start,
                    labels=labels,
                    split=_split(table.name, video),
                    licence=LICENCE,
                    precut=True,
                    origin=f"youtube:{video}",
                ),
                *segment_names(video, start, end),
            )
    yield from files.unlisted(CORPUS)


def _split(table: str, video: str) -> str:
    if table.startswith("eval"):
        return "test"
    return hash_split(f"youtube:{video}", test=0.0) if table.startswith("balanced") else "train"


def segment_names(video: str, start: float, end: float) -> list[str]:
    """The names under which downloaders store a segment of a YouTube video."""
    stems = [video]
    for scale in (1, 1000):
        first, last = round(start * scale), round(end * scale)
        stems += [f"{video}_{first}_{last}", f"{video}_{first}"]
    return stems + [f"Y{stem}" for stem in stems]
