"""GigaSpeech: `GigaSpeech.json` with the transcribed segments of long recordings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.corpora.files import MISSING, BadLine, hash_split, inside, json_entries, safe_id, tidy
from pipelines.corpora.records import Record, Recording, Rejected

LAYOUT = "GigaSpeech (GigaSpeech.json beside audio/)"
LICENCE = "GigaSpeech, non-commercial research"
CORPUS = "gigaspeech"
PUBLISHED_COUNTS = {"XL": 8_282_988, "DEV": 6_750, "TEST": 25_619}  # segments, rows of the hub's copy
PUNCTUATION = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
GARBAGE = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")

_OTHER_TAG = re.compile(r"<[a-z_]+>")
_SENTENCE_START = re.compile(r"(^|[.?!] )([a-z])")
_FIRST_PERSON = re.compile(r"\bi\b")


def detect(root: Path) -> bool:
    """Whether the folder holds GigaSpeech's metadata."""
    return (root / "GigaSpeech.json").is_file()


def read(root: Path, follow_links: bool = False) -> Iterator[Record]:
    """The transcribed segments. Those of silence, music, noise or other sound are rejected.

    The subsets DEV and TEST are validation and test. A copy without them is dealt by a hash of the recordings'
    ids: segments of one recording share their speakers, and so their split.
    """
    table = root / "GigaSpeech.json"
    official = _has_official_split(table)
    for entry in json_entries(table, "audios"):
        if isinstance(entry, BadLine):
            yield entry.rejected(CORPUS)
            continue
        line, audio = entry
        relative, segments = audio.get("path"), audio.get("segments")
        if not isinstance(relative, str) or not isinstance(segments, list):
            yield BadLine(table, line, "a recording without path or segments").rejected(CORPUS)
            continue
        path = inside(root, relative)
        exists = path is not None and Path(path).is_file()
        for segment in segments:
            yield _segment(root, table, line, path, exists, audio, segment, official)


def _segment(
    root: Path, table: Path, line: int, path: str | None, exists: bool, audio: dict[str, Any], segment: Any, official: bool
) -> Record:
    try:
        name, start, end = str(segment["sid"]), float(segment["begin_time"]), float(segment["end_time"])
        text = str(segment["text_tn"])
        subsets = {str(subset).strip("{}") for subset in [*audio.get("subsets", []), *segment.get("subsets", [])]}
        if not 0 <= start < end < float("inf"):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        return BadLine(table, line, f"a segment of {audio.get('aid')} without sid, begin_time, end_time or text_tn").rejected(CORPUS)
    recording_id = safe_id(name)
    clip_id = f"{CORPUS}-{recording_id}"
    if path is None or not exists:
        return Rejected(CORPUS, path or str(root), clip_id, MISSING if path else f"{MISSING}: the path leaves the corpus")
    garbage = next((tag for tag in GARBAGE if tag in text), None)
    if garbage is not None:
        return Rejected(CORPUS, path, clip_id, f"no speech: {garbage}")
    transcript = sentence(text)
    if not transcript:
        return Rejected(CORPUS, path, clip_id, "no speech: the transcript is empty")
    if official:
        split = "test" if "TEST" in subsets else "validation" if "DEV" in subsets else "train"
    else:
        split = hash_split(str(audio.get("aid") or path))
    return Recording(
        CORPUS,
        recording_id,
        path,
        start,
        end - start,
        transcript=transcript,
        split=split,
        licence=LICENCE,
        origin=f"{CORPUS}:{name}",
    )


def sentence(text: str) -> str:
    """GigaSpeech's capitals and tags as an ordinary sentence: "HELLO <COMMA> IT'S I <PERIOD>" → "Hello, it's I."."""
    text = tidy(text).lower()
    for tag, mark in PUNCTUATION.items():
        text = re.sub(rf"\s*{tag.lower()}", mark, text)
    text = tidy(_OTHER_TAG.sub(" ", text))
    text = _FIRST_PERSON.sub("I", text)
    text = _SENTENCE_START.sub(lambda start: start[1] + start[2].upper(), text)
    return text if any(letter.isalnum() for letter in text) else ""


def _has_official_split(table: Path) -> bool:
    """Whether any subset of the file is DEV or TEST; looks at the bytes, piece by piece."""
    tail = b""
    with table.open("rb") as stream:
        while piece := stream.read(1 << 24):
            if re.search(rb'"\{(DEV|TEST)\}"', tail + piece):
                return True
            tail = piece[-16:]
    return False
