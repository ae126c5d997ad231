"""The corpora loa reads: what lies in a folder, and a reader for each published layout.

A reader is a module with `LAYOUT` (what it looks for, in words), `detect(root)` and `read(root)`; it lists
recordings and texts and never opens a sound file. It may also say `OPT_IN` (read only when asked for), `EVALUATION_ONLY` (no
recording of it is ever trained on) and `PUBLISHED_COUNTS` (recordings of the whole corpus, with their source). docs/corpora.md
shows how to add one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from pipelines.corpora import (
    audiocaps,
    audioset,
    clotho,
    fma,
    folder,
    gigaspeech,
    hf_datasets,
    ljspeech,
    msd,
    musiccaps,
    vggsound,
    wavcaps,
    webdataset_tars,
)
from pipelines.corpora.fields import is_part
from pipelines.corpora.files import MALFORMED, MISSING
from pipelines.corpora.records import Record, Recording, Rejected
from stages.errors import UserError

__all__ = ["LAYOUTS", "OPT_IN", "PUBLISHED", "READERS", "Record", "Recording", "Rejected", "coverage", "discover", "read", "wanted"]

READERS: dict[str, ModuleType] = {
    "audioset": audioset,
    "audiocaps": audiocaps,
    "wavcaps": wavcaps,
    "msd": msd,
    "ljspeech": ljspeech,
    "gigaspeech": gigaspeech,
    "vggsound": vggsound,
    "fma": fma,
    "musiccaps": musiccaps,
    "clotho": clotho,
    "webdataset": webdataset_tars,
    "hf_datasets": hf_datasets,
    "folder": folder,
}
LAYOUTS = {name: reader.LAYOUT for name, reader in READERS.items()}
OWN = ("webdataset", "hf_datasets", "folder")  # ways to store one's own recordings; the others are published corpora
PUBLISHED = [name for name in READERS if name not in OWN]
OPT_IN = [name for name, reader in READERS.items() if getattr(reader, "OPT_IN", False)]
EVALUATION_ONLY = [name for name, reader in READERS.items() if getattr(reader, "EVALUATION_ONLY", False)]


def known(root: Path) -> list[str]:
    """The published corpora whose layout `root` has; if it has none, the ways of storing one's own that are files of many recordings."""
    published = [name for name in PUBLISHED if READERS[name].detect(root)]
    return published or [name for name in OWN if name != "folder" and READERS[name].detect(root)]


def discover(data_dir: Path) -> list[tuple[str, Path]]:
    """(corpus, root) of everything in a folder: published layouts at it or one level below, in any mix.

    Sound that belongs to none of them is a corpus of its own, read as `folder`. Raises UserError when there is no
    such folder; returns [] when it holds no corpus and no sound.
    """
    data_dir = Path(os.path.abspath(data_dir))
    if not data_dir.is_dir():
        raise UserError(f"{data_dir} {'is a file' if data_dir.exists() else 'does not exist'}; --data takes a folder of recordings")
    at_root = known(data_dir)
    children = _children(data_dir)
    below = [(name, child) for child in children for name in known(child) if not (name in OWN and name in at_root and is_part(child))]
    sources = [(name, data_dir) for name in at_root] + below
    if not set(at_root) & set(PUBLISHED) and folder.detect(data_dir, skip=_published_below(data_dir)):
        sources.append(("folder", data_dir))
    return sources


def wanted(folders: Sequence[Path], include: Sequence[str] = ()) -> tuple[list[tuple[str, Path]], list[str]]:
    """(corpus, root) of everything in the folders that is to be read, and a sentence on each that is read only when `include` names it.

    Raises UserError when nothing is left to read.
    """
    sources = list(dict.fromkeys(source for folder_path in folders for source in discover(folder_path)))
    if not sources:
        names = " and ".join(map(str, folders)) or "no folder"
        layouts = "; ".join(LAYOUTS.values())
        raise UserError(f"{names} contains no recordings; searched it and the folders directly below for {layouts}")
    asleep = [(name, root) for name, root in sources if name in OPT_IN and name not in include]
    sentences = [f"{root} holds {name}, which is read only when asked for: add `--include {name}`" for name, root in asleep]
    if len(asleep) == len(sources):
        raise UserError("; ".join(sentences))
    return [source for source in sources if source not in asleep], sentences


def read(corpus: str, root: Path, keep_blacklisted: bool = False) -> Iterator[Record]:
    """Everything a corpus lists, in a fixed order.

    `folder` leaves out what lies below it in a published layout. `keep_blacklisted` ignores WavCaps' blacklists. A corpus that is
    for evaluation alone has no training recordings, whatever its reader says.
    """
    if corpus == "folder":
        return folder.read(root, skip=_published_below(Path(root)))
    if corpus == "wavcaps":
        return wavcaps.read(root, keep_blacklisted=keep_blacklisted)
    records: Iterator[Record] = READERS[corpus].read(root)
    return map(_held_out, records) if corpus in EVALUATION_ONLY else records


def coverage(corpus: str, found: int, rejected: Mapping[str, int]) -> str:
    """One sentence on how much of a published corpus is there; "" for one's own recordings.

    Args:
        found: usable recordings.
        rejected: how many rows were rejected, by kind.
    """
    published = sum(getattr(READERS[corpus], "PUBLISHED_COUNTS", {}).values())
    if not published:
        return ""
    missing = rejected.get(MISSING, 0)
    broken = sum(count for kind, count in rejected.items() if kind in BROKEN or kind.startswith("malformed"))
    return f"{corpus}: {found:,} found, {missing:,} missing, {broken:,} broken of {published:,} published"


BROKEN = (MALFORMED, "unreadable", "empty", "outside the recording", "duplicate id")  # kinds of rejection that are damage, not choice


def _held_out(record: Record) -> Record:
    return replace(record, split="test") if isinstance(record, Recording) and record.split == "train" else record


def _children(folder_path: Path) -> list[Path]:
    return sorted(child for child in folder_path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _published_below(root: Path) -> list[Path]:
    """The folders below `root` that are a published corpus each."""
    return [child for child in _children(root) if set(known(child)) & set(PUBLISHED)]
