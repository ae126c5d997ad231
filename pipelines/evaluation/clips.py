"""Which clips an evaluation is about: drawn from a store in turn from all classes, or those of a frozen caption list."""

from __future__ import annotations

import csv
import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines.evaluation.records import digest, some
from pipelines.features.reader import StoreReader
from stages.errors import UserError
from stages.files import write_json
from stages.text import clip_texts

CAPTIONS_FORMAT = 1
VOICE = "A person is speaking."  # the prompt of a speech clip without a caption


@dataclass(frozen=True)
class HeldOut:
    """One clip to generate: its caption, and for speech what is said."""

    clip_id: str
    corpus: str
    text: str
    transcript: str
    label: str | None  # its class: the first label

    @property
    def key(self) -> str:
        """Tells this clip and text from all others, in file names."""
        return f"{self.clip_id}.{digest([self.text, self.transcript], 8)}"


def captions_hash(clips: Sequence[HeldOut]) -> str:
    """sha256 of the list of clips and texts: scores compare only where it is the same."""
    return digest([[clip.clip_id, clip.text, clip.transcript] for clip in clips], 64)


def write_captions(path: Path, clips: Sequence[HeldOut]) -> None:
    """Freeze a caption list: JSON with its own hash, which `read_captions` checks."""
    rows = [dataclasses.asdict(clip) for clip in clips]
    write_json(path, {"format": CAPTIONS_FORMAT, "sha256": captions_hash(clips), "clips": rows})


def read_captions(path: Path) -> list[HeldOut]:
    """A frozen caption list: what `write_captions` wrote, or a CSV with columns clip_id and caption (transcript, label).

    Raises:
        UserError: the list is empty, lacks a column, names a clip twice, or was changed after it was frozen.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".csv":
            clips = _captions_of_csv(path)
        else:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.get("format") != CAPTIONS_FORMAT:
                raise UserError(f"{path} has format {values.get('format')}, this version of loa reads {CAPTIONS_FORMAT}")
            clips = [HeldOut(**row) for row in values["clips"]]
            if captions_hash(clips) != values["sha256"]:
                raise UserError(f"{path} was changed after it was frozen: its hash is {captions_hash(clips)}, it says {values['sha256']}")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no caption list: expected a frozen list or a CSV with clip_id and caption ({error})") from error
    names = [clip.clip_id for clip in clips]
    if not names:
        raise UserError(f"{path} names no clip")
    if len(set(names)) < len(names):
        raise UserError(f"{path} names clips twice: {some([n for n in names if names.count(n) > 1])}; take one caption per clip")
    return clips


def _captions_of_csv(path: Path) -> list[HeldOut]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        if not {"clip_id", "caption"} <= set(table.fieldnames or ()):
            raise UserError(f"{path} has the columns {', '.join(table.fieldnames or ())}; a caption list has clip_id and caption")
        rows = [{name: (value or "").strip() for name, value in row.items() if name} for row in table]
    return [HeldOut(r["clip_id"], r.get("corpus", ""), r["caption"], r.get("transcript", ""), r.get("label") or None) for r in rows]


# ------------------------------------------------------------------------------------------------------ choosing


def choose_clips(
    table: pd.DataFrame, available: StoreReader, split: str | None, count: int, seed: int, speech: bool = False
) -> tuple[str, list[HeldOut], list[HeldOut]]:
    """The clips to evaluate, and as many others of the same split if there are: taken in turn from all classes.

    The order depends on the seed and the clips alone, and a larger count only adds to it. Where some clips have labels,
    only those are taken. Of several captions one is drawn.

    Returns:
        The split, the clips, and the others.
    """
    table = table[[clip_id in available for clip_id in table["clip_id"]]]
    tried = [split] if split else ["test", "validation"]
    for name in tried:
        rows = [_held_out(row, seed, speech) for row in table[table["split"] == name].to_dict("records")]
        found = [clip for clip in rows if clip.text and (clip.transcript or not speech)]
        if found:
            found = [clip for clip in found if clip.label] or found
            ordered = _in_turn(found, seed)
            return name, ordered[:count], ordered[count : 2 * count]
    there = table["split"].value_counts().to_dict()
    wanted = "a transcript" if speech else "a caption"
    hint = f"the store holds {there}; choose another with --split" if there else "no clip of the store has its waveform"
    raise UserError(f"no clip of the split {' or '.join(tried)} has {wanted} to generate from; {hint}")


def frozen_clips(
    table: pd.DataFrame, available: StoreReader, captions: Path, seed: int, speech: bool = False
) -> tuple[str, list[HeldOut], list[HeldOut]]:
    """The clips of a frozen caption list with its captions, as `choose_clips` returns them."""
    frozen = read_captions(captions)
    rows = {row["clip_id"]: row for row in table.to_dict("records") if row["clip_id"] in available}
    lacking = [clip.clip_id for clip in frozen if clip.clip_id not in rows]
    if lacking:
        raise UserError(
            f"the store lacks {len(lacking)} of the {len(frozen)} clips in {captions}: {some(lacking)}; name the list's own store"
        )
    clips = []
    for clip in frozen:
        there = _held_out(rows[clip.clip_id], seed, speech)
        clips.append(replace(clip, corpus=there.corpus, label=there.label))
    wordless = [clip.clip_id for clip in clips if not (clip.transcript if speech else clip.text)]
    if wordless:
        raise UserError(f"{captions} has no {'transcript' if speech else 'caption'} for {some(wordless)}")
    splits = sorted({rows[clip.clip_id]["split"] for clip in clips})
    taken = {clip.clip_id for clip in clips}
    same_split = _in_turn([_held_out(row, seed, speech) for row in rows.values() if row["split"] in splits], seed)
    return ", ".join(splits), clips, [clip for clip in same_split if clip.clip_id not in taken][: len(clips)]


def _held_out(row: Mapping[str, Any], seed: int, speech: bool) -> HeldOut:
    rng = np.random.default_rng([seed, zlib.crc32(row["clip_id"].encode())])
    texts = clip_texts(row)
    text = texts[int(rng.integers(len(texts)))]
    labels = list(row["labels"]) if row["labels"] is not None else []
    transcript = str(row["transcript"] or "") if speech else ""
    return HeldOut(row["clip_id"], row["corpus"], text or (VOICE if speech else ""), transcript, str(labels[0]) if labels else None)


def _in_turn(clips: Sequence[HeldOut], seed: int) -> list[HeldOut]:
    """One clip of each class, then the next of each, …; within a class in shuffled order."""
    classes: dict[str, list[HeldOut]] = {}
    for clip in sorted(clips, key=lambda c: (c.label or "", c.clip_id)):
        classes.setdefault(clip.label or "", []).append(clip)
    rng = np.random.default_rng(seed)
    queues = [[members[i] for i in rng.permutation(len(members))] for members in classes.values()]
    return [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
