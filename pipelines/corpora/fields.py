"""What a row of a data set says of its recording, by the names that people give columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.corpora.captions import COLUMNS
from pipelines.corpora.files import hash_split, split_named, texts, tidy
from pipelines.corpora.records import Recording

_CAPTION = re.compile(r"caption_?\d+")


class Words(NamedTuple):
    """The texts of a recording; `split` is None for a name that is none, "" where there is none."""

    captions: tuple[str, ...]
    labels: tuple[str, ...]
    transcript: str
    split: str | None
    licence: str

    def record(self, corpus: str, recording_id: str, address: str, split: str) -> Recording:
        """The recording at `address` that has them; `split` holds where they name none."""
        return Recording(
            corpus,
            recording_id,
            address,
            captions=self.captions,
            labels=self.labels,
            transcript=self.transcript,
            split=self.split or split,
            licence=self.licence,
        )


def words(row: Mapping[str, Any]) -> Words:
    """The texts of a row whose columns are named as in a folder's tables; `caption_1`, `caption_2`, … are captions, too.

    A label that is a number says nothing to anybody and is left out.
    """
    cells = {name.strip().lower(): value for name, value in row.items()}
    for name in cells.keys() & COLUMNS["label"]:
        value = cells[name]
        cells[name] = [label for label in (value if isinstance(value, list) else [value]) if isinstance(label, str)]

    def of(column: str) -> tuple[str, ...]:
        return texts([text for name in COLUMNS[column] if name in cells for text in texts(cells[name])])

    numbered = [cells[name] for name in sorted(cells) if _CAPTION.fullmatch(name)]
    labels = [part for label in of("label") for part in label.split(";")]
    split = next(iter(of("split")), "")
    return Words(
        captions=texts([*of("caption"), *map(tidy, numbered)]),
        labels=texts(labels),
        transcript=next(iter(of("transcript")), ""),
        split=split_named(split) if split else "",
        licence=next(iter(of("licence")), ""),
    )


def split_of(path: Path) -> str:
    """The split that a shard is called after (`train-00001.tar`, `validation/000.tar`), or ""."""
    for name in (re.split(r"[-_.]", path.name)[0], path.parent.name):
        split = split_named(name)
        if split is not None:
            return split
    return ""


def dealt(recording_id: str, split: str, splits: set[str]) -> str:
    """The split of a recording in a shard of `split`, among shards of `splits`: by a hash of its id where no shard is held out."""
    return split if split and splits & {"validation", "test"} else hash_split(recording_id)


def is_part(child: Path) -> bool:
    """Whether a folder of a data set holds shards of it: its `data/`, and what is called after a split."""
    return child.is_dir() and (child.name == "data" or split_named(child.name) is not None)


def shards(root: Path, *suffixes: str) -> list[Path]:
    """The files that end so in a folder and in its parts; what of them is not ours to read is left out."""
    folders = [root, *filter(is_part, _inside(root))]
    return [path for folder in folders for path in _inside(folder) if path.name.endswith(suffixes) and path.is_file()]


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # vanished, or not ours to read
        return []
