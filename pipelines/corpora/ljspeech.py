"""LJSpeech: `metadata.csv` with `id|text|normalised text`, and `wavs/<id>.wav`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.corpora.files import AudioFiles, BadLine, csv_lines, hash_split, safe_id, tidy
from pipelines.corpora.records import Record, Recording

LAYOUT = "LJSpeech (metadata.csv with id|text|normalised text beside wavs/)"
LICENCE = "LJSpeech, public domain"
CORPUS = "ljspeech"
PUBLISHED_COUNTS = {"utterances": 13_100}  # its README


def detect(root: Path) -> bool:
    """Whether the folder holds LJSpeech."""
    if not ((root / "metadata.csv").is_file() and (root / "wavs").is_dir()):
        return False
    with (root / "metadata.csv").open("rb") as stream:
        return b"|" in stream.readline(1 << 16)


def read(root: Path, follow_links: bool = False) -> Iterator[Record]:
    """The utterances with their normalised text, dealt to splits by a hash of their id (LJSpeech has none)."""
    table = root / "metadata.csv"
    files = AudioFiles(root / "wavs", root=root, follow_links=follow_links)
    for line in csv_lines(table, delimiter="|", quoted=False):
        if isinstance(line, BadLine):
            yield line.rejected(CORPUS)
            continue
        number, fields = line
        name, transcript = fields[0].strip(), tidy(fields[-1])
        if len(fields) not in (2, 3) or not name or not transcript:
            yield BadLine(table, number, "expected id|text|normalised text").rejected(CORPUS)
            continue
        recording_id = safe_id(name)
        yield files.found(
            Recording(
                CORPUS,
                recording_id,
                str(root / "wavs" / f"{name}.wav"),
                transcript=transcript,
                split=hash_split(recording_id),
                licence=LICENCE,
                origin=f"{CORPUS}:{name}",
            ),
            name,
        )
    yield from files.unlisted(CORPUS)
