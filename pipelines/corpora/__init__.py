"""The corpora loa reads: what lies in a folder, and a reader for each published layout.

A reader is a module with `LAYOUT` (what it looks for, in words), `detect(root)` and `read(root)`; it lists
recordings and texts and never opens a sound file. It may also say `OPT_IN` (read only when asked for), `EVALUATION_ONLY` (no
recording of it is ever trained on) and `PUBLISHED_COUNTS` (recordings of the whole corpus, with their source). docs/corpora.md
shows how to add one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

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
from pipelines.corpora.files import MALFORMED, MISSING, Links, link_outside
from pipelines.corpora.records import NOT_STATED, Record, Recording, Rejected
from pipelines.corpora.words import caption_problem, class_name
from stages.errors import UserError
from stages.recordings import parse_address

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


def discover(data_dir: Path, follow_links: bool = False) -> list[tuple[str, Path]]:
    """(corpus, root) of everything in a folder: published layouts at it or one level below, in any mix.

    Sound that belongs to none of them is a corpus of its own, read as `folder`, and so are links that lead out of the folder:
    reading it counts them. Raises UserError when there is no such folder; returns [] when it holds no corpus and no sound.
    """
    data_dir = Path(os.path.abspath(data_dir))
    if not data_dir.is_dir():
        raise UserError(f"{data_dir} {'is a file' if data_dir.exists() else 'does not exist'}; --data takes a folder of recordings")
    at_root = known(data_dir)
    children = _folders(data_dir, follow_links)
    below = [(name, child) for child in children for name in known(child) if not (name in OWN and name in at_root and is_part(child))]
    sources = [(name, data_dir) for name in at_root] + below
    if not set(at_root) & set(PUBLISHED) and folder.detect(data_dir, _apart(children, follow_links), follow_links):
        sources.append(("folder", data_dir))
    return sources


def wanted(folders: Sequence[Path], include: Sequence[str] = (), follow_links: bool = False) -> tuple[list[tuple[str, Path]], list[str]]:
    """(corpus, root) of everything in the folders that is to be read, and a sentence on each that is read only when `include` names it.

    Raises UserError when nothing is left to read.
    """
    sources = list(dict.fromkeys(source for folder_path in folders for source in discover(folder_path, follow_links)))
    if not sources:
        names = " and ".join(map(str, folders)) or "no folder"
        layouts = "; ".join(LAYOUTS.values())
        raise UserError(f"{names} contains no recordings; searched it and the folders directly below for {layouts}")
    asleep = [(name, root) for name, root in sources if name in OPT_IN and name not in include]
    sentences = [f"{root} holds {name}, which is read only when asked for: add `--include {name}`" for name, root in asleep]
    if len(asleep) == len(sources):
        raise UserError("; ".join(sentences))
    return [source for source in sources if source not in asleep], sentences


def read(corpus: str, root: Path, keep_blacklisted: bool = False, follow_links: bool = False) -> Iterator[Record]:
    """Everything a corpus lists, in a fixed order, with labels and captions in the form all corpora share (`words`).

    `folder` leaves out what lies below it in a published layout. `keep_blacklisted` ignores WavCaps' blacklists. Recordings to which
    links lead out of `root` are rejected unless `follow_links` says otherwise. A corpus that is for evaluation alone has no training
    recordings, whatever its reader says.
    """
    options: dict[str, Any] = {"follow_links": True} if follow_links else {}
    if corpus == "folder":
        options["skip"] = _apart(_folders(Path(root), follow_links), follow_links)
    if corpus == "wavcaps":
        options["keep_blacklisted"] = keep_blacklisted
    links = None if follow_links else Links(root)
    for record in READERS[corpus].read(root, **options):
        if isinstance(record, Rejected):
            yield record
        elif links and links.lead_outside(file := parse_address(record.path).file):
            yield link_outside(corpus, file, record.clip_id)
        else:
            held_out = replace(record, split="test") if corpus in EVALUATION_ONLY and record.split == "train" else record
            yield from _in_common_words(held_out)


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


def _folders(root: Path, follow_links: bool) -> list[Path]:
    """The folders directly below `root`, without hidden ones and those to which links lead out of it."""
    links = Links(root)
    folders = [child for child in sorted(root.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    return [child for child in folders if follow_links or not links.lead_outside(str(child))]


def _apart(folders: Iterable[Path], follow_links: bool) -> list[Path]:
    """Those of the folders that have nothing for the reader of loose sound: a published corpus, or shards and no sound beside them."""
    layouts = ((path, known(path)) for path in folders)
    return [path for path, names in layouts if set(names) & set(PUBLISHED) or (names and not folder.detect(path, (), follow_links))]


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
