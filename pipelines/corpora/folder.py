"""A person's own sound: any folder of recordings, with captions in tables, in files beside them, or not at all."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipelines.corpora.captions import CORPUS, Notes, Sounds, is_sidecar, is_table, read_table, sidecar
from pipelines.corpora.files import MISSING, hash_split, is_audio, link_outside, printable, safe_id, walk_audio
from pipelines.corpora.records import Record, Recording, Rejected

LAYOUT = "a folder of recordings (with a table such as captions.csv or captions.jsonl, or a .txt per recording)"
TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")  # they promise recordings, even where there are none


def detect(root: Path, skip: Iterable[Path] = (), follow_links: bool = False) -> bool:
    """Whether there is any sound below the folder, a table that promises some, or a link that leads to some elsewhere."""
    outside: list[str] = []
    sound = next(walk_audio(root, skip, follow_links=follow_links, outside=outside), None)
    return sound is not None or bool(outside) or any((root / name).is_file() for name in TABLES)


def read(root: Path, skip: Iterable[Path] = (), follow_links: bool = False) -> Iterator[Record]:
    """Every recording below `root` but below `skip`.

    A table names files relative to its own folder; several rows of one file give it several captions, and several
    labels are parted by ";". A recording without any text is kept: the stages that need none train on it. Splits come from
    the table, else from a hash of the file's place below `root`.
    """
    root = Path(os.path.abspath(root))
    outside: list[str] = []
    files = list(walk_audio(root, skip, None, follow_links, outside, wanted=lambda name: is_audio(name) or is_table(name)))
    recordings = [path for path in files if is_audio(path)]
    sounds = Sounds(recordings)
    notes: dict[str, Notes] = {}
    for table in map(Path, files):
        if not is_audio(table.name) and not is_sidecar(table, sounds):
            yield from read_table(table, root, sounds, notes)
    for path in sorted(notes.keys() - sounds.paths):
        exists = os.path.isfile(path)
        reason = f"unreadable: {Path(path).suffix or 'a file without suffix'} is no sound file" if exists else MISSING
        yield Rejected(CORPUS, printable(path), "", reason)
    for path in outside:
        yield link_outside(CORPUS, path)
    yield from _recordings(root, recordings, notes)


def _recordings(root: Path, paths: list[str], notes: dict[str, Notes]) -> Iterator[Record]:
    named = {path: os.path.relpath(path, root).rpartition(".") for path in paths}
    shared_names = Counter(stem for stem, _, _ in named.values())
    for path, (stem, _, suffix) in named.items():
        # dog.wav and dog.flac are two recordings, and only then does the suffix belong to the id.
        name = f"{root.name}_{stem}"
        recording_id = safe_id(name if shared_names[stem] == 1 else f"{name}_{suffix}")
        if printable(path) != path:
            yield Rejected(CORPUS, printable(path), f"{CORPUS}-{recording_id}", "unreadable: its name is not UTF-8; rename it")
            continue
        note = notes.get(path, Notes())
        beside = sidecar(Path(path))
        yield Recording(
            CORPUS,
            recording_id,
            path,
            captions=tuple(dict.fromkeys(note.captions or beside.captions)),
            transcript=note.transcript or beside.transcript,
            labels=tuple(dict.fromkeys(note.labels or beside.labels)),
            split=note.split or beside.split or hash_split(safe_id(name)),
            licence=note.licence or beside.licence,
        )
