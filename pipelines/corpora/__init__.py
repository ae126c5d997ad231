"""The corpora loa reads: what lies in a folder, and a reader for each published layout.

A reader is a module with `LAYOUT` (what it looks for, in words), `detect(root)` and `read(root)`; it lists
recordings and texts and never opens a sound file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from pipelines.corpora import audiocaps, audioset, folder, gigaspeech, ljspeech, msd, wavcaps
from pipelines.corpora.records import Record, Recording, Rejected
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


def discover(data_dir: Path) -> list[tuple[str, Path]]:
    """(corpus, root) of everything in a folder: published layouts at it or one level below, in any mix.

    Sound that belongs to none of them is a corpus of its own, read as `folder`. Raises UserError when there is no
    such folder; returns [] when it holds no corpus and no sound.
    """
    data_dir = Path(os.path.abspath(data_dir))
    if not data_dir.is_dir():
        raise UserError(f"{data_dir} {'is a file' if data_dir.exists() else 'does not exist'}; --data takes a folder of recordings")
    found = [(name, data_dir) for name in known(data_dir)]
    children = sorted(child for child in data_dir.iterdir() if child.is_dir() and not child.name.startswith("."))
    below = [(name, child) for child in children for name in known(child)]
    if not found and folder.detect(data_dir, skip=[root for _, root in below]):
        below.append(("folder", data_dir))
    return found + below


def read(corpus: str, root: Path, keep_blacklisted: bool = False) -> Iterator[Record]:
    """Everything a corpus lists, in a fixed order.

    `folder` leaves out what lies below it in a published layout. `keep_blacklisted` ignores WavCaps' blacklists.
    """
    if corpus == "folder":
        children = [child for child in Path(root).iterdir() if child.is_dir()]
        return folder.read(root, skip=[child for child in children if known(child)])
    if corpus == "wavcaps":
        return wavcaps.read(root, keep_blacklisted=keep_blacklisted)
    records: Iterator[Record] = READERS[corpus].read(root)
    return records
