"""The corpora loa reads: what lies in a folder, and a reader for each published layout.

A reader is a module with `LAYOUT` (what it looks for, in words), `detect(root)` and `read(root)`; it lists
recordings and texts and never opens a sound file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from pipelines.corpora import audiocaps, audioset, folder, gigaspeech, ljspeech, msd, wavcaps
from pipelines.corpora.files import Links, link_outside
from pipelines.corpora.records import NOT_STATED, Record, Recording, Rejected
from pipelines.corpora.words import caption_problem, class_name
from stages.errors import UserError

__all__ = ["LAYOUTS", "PUBLISHED", "READERS", "Record", "Recording", "Rejected", "discover", "read"]

READERS: dict[str, ModuleType] = {
    "audioset": audioset,
    "audiocaps": audiocaps,
    "wavcaps": wavcaps,
    "msd": msd,
    "ljspeech": ljspeech,
    "gigaspeech": gigaspeech,
    "folder": folder,
}
LAYOUTS = {name: reader.LAYOUT for name, reader in READERS.items()}
PUBLISHED = [name for name in READERS if name != "folder"]


def known(root: Path) -> list[str]:
    """The published corpora whose layout `root` has."""
    return [name for name in PUBLISHED if READERS[name].detect(root)]


def discover(data_dir: Path, follow_links: bool = False) -> list[tuple[str, Path]]:
    """(corpus, root) of everything in a folder: published layouts at it or one level below, in any mix.

    Sound that belongs to none of them is a corpus of its own, read as `folder`, and so are links that lead out of the folder:
    reading it counts them. Raises UserError when there is no such folder; returns [] when it holds no corpus and no sound.
    """
    data_dir = Path(os.path.abspath(data_dir))
    if not data_dir.is_dir():
        raise UserError(f"{data_dir} {'is a file' if data_dir.exists() else 'does not exist'}; --data takes a folder of recordings")
    at_root = [(name, data_dir) for name in known(data_dir)]
    children = _folders(data_dir, follow_links)
    below = [(name, child) for child in children for name in known(child)]
    if not at_root and folder.detect(data_dir, skip=[root for _, root in below], follow_links=follow_links):
        below.append(("folder", data_dir))
    return at_root + below


def read(corpus: str, root: Path, keep_blacklisted: bool = False, follow_links: bool = False) -> Iterator[Record]:
    """Everything a corpus lists, in a fixed order, with labels and captions in the form all corpora share (`words`).

    `folder` leaves out what lies below it in a published layout. `keep_blacklisted` ignores WavCaps' blacklists.
    Recordings to which links lead out of `root` are rejected unless `follow_links` says otherwise.
    """
    options: dict[str, Any] = {"follow_links": True} if follow_links else {}
    if corpus == "folder":
        options["skip"] = [child for child in _folders(Path(root), follow_links) if known(child)]
    if corpus == "wavcaps":
        options["keep_blacklisted"] = keep_blacklisted
    links = None if follow_links else Links(root)
    for record in READERS[corpus].read(root, **options):
        if isinstance(record, Rejected):
            yield record
        elif links and links.lead_outside(record.path):
            yield link_outside(corpus, record.path, record.clip_id)
        else:
            yield from _in_common_words(record)


def _folders(root: Path, follow_links: bool) -> list[Path]:
    """The folders directly below `root`, without hidden ones and those to which links lead out of it."""
    links = Links(root)
    folders = [child for child in sorted(root.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    return [child for child in folders if follow_links or not links.lead_outside(str(child))]


def _in_common_words(recording: Recording) -> Iterator[Record]:
    """A recording with the common names of its classes, and its unusable captions as rejected."""
    problems = {caption: problem for caption in recording.captions if (problem := caption_problem(caption))}
    yield from (recording.rejected(problem) for problem in problems.values())
    yield replace(
        recording,
        captions=tuple(caption for caption in recording.captions if caption not in problems),
        labels=tuple(dict.fromkeys(filter(None, map(class_name, recording.labels)))),
        licence=recording.licence or NOT_STATED,
    )
