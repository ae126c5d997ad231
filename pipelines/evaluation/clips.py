"""Sets of clips: recordings with their texts, drawn from a store, named by a frozen list, or found in a folder."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.corpora.files import walk_audio
from pipelines.evaluation import metrics
from pipelines.evaluation.records import SILENT_LIMIT
from pipelines.features.reader import StoreReader
from stages.audio import Waveform, load_audio, probe
from stages.errors import AudioError, UserError, some
from stages.files import digest, write_json
from stages.text import clip_texts

CAPTIONS_FORMAT = 2
VOICE = "A person is speaking."  # the prompt of a speech clip without a caption

Channels = Literal["mean", "first"]
# A set is what is evaluated; real clips through parts of the system; the real clips; or other real clips, as a floor for distances.
Role = Literal["system", "restored", "reference", "floor"]


# ---------------------------------------------------------------------------------------------------------- one clip


@dataclass(frozen=True)
class Clip:
    """One clip of a list: its caption, and for speech the transcript."""

    clip_id: str
    corpus: str
    text: str
    transcript: str
    label: str | None  # its class: the first label

    @property
    def key(self) -> str:
        """Tells this clip and text from all others, in file names."""
        return f"{self.clip_id}.{digest([self.text, self.transcript], 8)}"


@dataclass(frozen=True)
class AudioFile:
    """A recording on disk, identified by its content."""

    path: Path
    sha256: str

    @classmethod
    def of(cls, path: Path) -> AudioFile:
        with Path(path).open("rb") as stream:
            return cls(Path(path), hashlib.file_digest(stream, "sha256").hexdigest())

    def read(self, channels: Channels = "mean") -> tuple[Waveform, int]:
        """The waveform `[T]` at its own rate, and that rate in Hz."""
        rate = probe(self.path).sample_rate
        return load_audio(self.path, rate, channel=None if channels == "mean" else 0), rate


# ------------------------------------------------------------------------------------------------------ sets of clips


@dataclass(frozen=True)
class ClipSet:
    """Recordings with their texts, in the order of clip ids: the inception score and FAD∞ depend on the order.

    Attributes:
        name: what records and tables call the set.
        made: how its sounds were made: weights, sampling settings, seed.
        seconds: how long each clip should be; shorter ones are reported. None: any length.
        candidates, ranker: of how many candidates each clip was chosen, and by what; None: unknown.
    """

    name: str
    role: Role
    clips: tuple[Clip, ...]
    files: tuple[AudioFile, ...]
    made: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float | None = None
    candidates: int | None = None
    ranker: str | None = None

    def __post_init__(self) -> None:
        order = sorted(range(len(self.clips)), key=lambda i: self.clips[i].clip_id)
        object.__setattr__(self, "clips", tuple(self.clips[i] for i in order))
        object.__setattr__(self, "files", tuple(self.files[i] for i in order))

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The place of every clip id in the set."""
        return {clip.clip_id: i for i, clip in enumerate(self.clips)}

    @cached_property
    def sha256(self) -> str:
        """Of the names and contents of the recordings."""
        return digest([[clip.clip_id, file.sha256] for clip, file in zip(self.clips, self.files, strict=True)])

    @property
    def captions_sha256(self) -> str | None:
        """Of clips and texts; None where no clip has any."""
        return captions_hash(self.clips) if any(clip.text or clip.transcript for clip in self.clips) else None

    def pairs_in(self, reference: ClipSet) -> list[int] | None:
        """The number in `reference` of the clip of each id here; None unless all have one."""
        numbers = [reference.numbers.get(clip.clip_id) for clip in self.clips]
        return None if None in numbers else [number for number in numbers if number is not None]

    def like(self, other: ClipSet) -> ClipSet:
        """This set's recordings of the clips of `other`, with the texts of `other`."""
        pairs = other.pairs_in(self)
        assert pairs is not None, f"{self.name} lacks clips of {other.name}"
        return replace(self, clips=other.clips, files=tuple(self.files[i] for i in pairs))

    def waveforms(self, channels: Channels = "mean") -> Iterator[tuple[Waveform, int]]:
        """Every waveform with its sample rate."""
        return (file.read(channels) for file in self.files)


def folder_set(name: str, role: Role, folder: Path, captions: Sequence[Clip] = (), **attributes: Any) -> ClipSet:
    """The recordings of a folder, whatever made them; clip ids are the file names without suffix.

    Args:
        captions: the texts; if there are any, they must be of exactly these clips.

    Raises:
        UserError: the folder does not exist, holds no recording, two of one name, or not the clips of `captions`.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is no folder; name one with recordings (WAV, FLAC, OGG, MP3 or AIFF)")
    paths = sorted((Path(path) for path in walk_audio(Path(folder))), key=lambda path: path.stem)
    names = [path.stem for path in paths]
    if not names:
        raise UserError(f"{folder} holds no recordings (WAV, FLAC, OGG, MP3 or AIFF)")
    if len(set(names)) < len(names):
        repeated = some(sorted(name for name in set(names) if names.count(name) > 1))
        raise UserError(f"{folder} holds several recordings named {repeated}; clips are told apart by their file names without suffix")
    listed = {clip.clip_id: clip for clip in captions}
    if listed:
        _require_same(listed, names, folder)
    clips = tuple(listed.get(name, Clip(name, "", "", "", None)) for name in names)
    return ClipSet(name, role, clips, tuple(map(AudioFile.of, paths)), **attributes)


def _require_same(listed: Collection[str], names: Collection[str], folder: Path) -> None:
    missing, surplus = [clip for clip in listed if clip not in names], [name for name in names if name not in listed]
    if missing or surplus:
        problems = [f"{len(missing)} of its clips are missing ({some(missing)})"] if missing else []
        problems += [f"{len(surplus)} clips there are not in it ({some(surplus)})"] if surplus else []
        raise UserError(f"{folder} does not hold the clips of the caption list: {'; '.join(problems)}; a score is of the whole list")


# -------------------------------------------------------------------------------------------------------- sound checks


@dataclass(frozen=True)
class SoundCheck:
    """What is wrong with the clips of a set, by name. Clips that hold no numbers are refused before."""

    clips: int
    silent: tuple[str, ...] = ()  # RMS below -60 dBFS
    clipped: tuple[str, ...] = ()  # three neighbouring samples at full scale
    short: tuple[str, ...] = ()  # shorter than asked by more than 50 ms

    def counts(self) -> dict[str, int]:
        """As records hold it."""
        return {"clips": self.clips, **{name: len(getattr(self, name)) for name in ("silent", "clipped", "short")}}

    def notes(self, name: str) -> list[str]:
        """One sentence per kind of finding; silence first."""
        notes = []
        if len(self.silent) > SILENT_LIMIT * self.clips:
            share = len(self.silent) / self.clips
            notes.append(f"{share:.0%} of the clips of {name} are silent: do not rank this system by its distances")
        for kind in ("silent", "clipped", "short"):
            if names := getattr(self, kind):
                notes.append(f"{len(names)} of {self.clips} clips of {name} are {kind}: {some(names)}")
        return notes


def check_sounds(clips: ClipSet, channels: Channels = "mean") -> SoundCheck:
    """Look at every clip of a set.

    Raises:
        UserError: clips cannot be read, are empty, or hold samples that are not finite; no number taken from such a set means anything.
    """
    broken: list[str] = []
    flaws: dict[str, list[str]] = {"silent": [], "clipped": [], "short": []}
    for clip, file in zip(clips.clips, clips.files, strict=True):
        try:
            waveform, rate = file.read(channels)
        except AudioError:
            broken.append(clip.clip_id)
            continue
        full = np.abs(waveform) >= 0.999
        findings = {
            "silent": metrics.level_dbfs(waveform) < metrics.SILENCE_DBFS,
            "clipped": bool((full[:-2] & full[1:-1] & full[2:]).any()),
            "short": clips.seconds is not None and len(waveform) / rate < clips.seconds - 0.05,
        }
        for kind, applies in findings.items():
            if applies:
                flaws[kind].append(clip.clip_id)
    if broken:
        raise UserError(
            f"{len(broken)} of {len(clips.clips)} clips of {clips.name} cannot be read, are empty or hold samples that are not finite: "
            f"{some(broken)}; make them again"
        )
    return SoundCheck(len(clips.clips), **{kind: tuple(names) for kind, names in flaws.items()})


# ------------------------------------------------------------------------------------------------------- caption lists


def captions_hash(clips: Sequence[Clip]) -> str:
    """sha256 of the list of clips and texts: scores compare only where it is the same."""
    return digest(sorted([clip.clip_id, clip.text, clip.transcript] for clip in clips))


def write_captions(path: Path, clips: Sequence[Clip]) -> None:
    """Freeze a caption list: JSON with its own hash, which `read_captions` checks."""
    rows = [dataclasses.asdict(clip) for clip in clips]
    write_json(path, {"format": CAPTIONS_FORMAT, "sha256": captions_hash(clips), "clips": rows})


def read_captions(path: Path) -> list[Clip]:
    """A frozen caption list: what `write_captions` wrote, or a CSV with columns clip_id and caption (transcript, label).

    Raises:
        UserError: the list is empty, lacks a column, names a clip twice, or was changed after it was frozen.
    """
    path = Path(path)
    try:
        clips = _captions_of_csv(path) if path.suffix.lower() == ".csv" else _captions_of_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no caption list: expected a frozen list or a CSV with clip_id and caption ({error})") from error
    names = [clip.clip_id for clip in clips]
    if not names:
        raise UserError(f"{path} names no clip")
    if len(set(names)) < len(names):
        raise UserError(f"{path} names clips twice: {some([n for n in names if names.count(n) > 1])}; take one caption per clip")
    return clips


def _captions_of_json(path: Path) -> list[Clip]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("format") != CAPTIONS_FORMAT:
        raise UserError(f"{path} has format {values.get('format')}, this version of loa reads {CAPTIONS_FORMAT}")
    clips = [Clip(**row) for row in values["clips"]]
    if captions_hash(clips) != values["sha256"]:
        raise UserError(f"{path} was changed after it was frozen: its hash is {captions_hash(clips)}, it says {values['sha256']}")
    return clips


def _captions_of_csv(path: Path) -> list[Clip]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        if not {"clip_id", "caption"} <= set(table.fieldnames or ()):
            raise UserError(f"{path} has the columns {', '.join(table.fieldnames or ())}; a caption list has clip_id and caption")
        rows = [{name: (value or "").strip() for name, value in row.items() if name} for row in table]
    return [Clip(r["clip_id"], r.get("corpus", ""), r["caption"], r.get("transcript", ""), r.get("label") or None) for r in rows]


# -------------------------------------------------------------------------------------------- choosing clips of a store


@dataclass(frozen=True)
class Selection:
    """Which clips of a store are evaluated.

    Attributes:
        count: how many captions, taken in turn from all classes.
        split: "test" if it has clips with captions, else "validation", if None.
        captions: a frozen caption list; its clips are taken, with its captions, instead of `count` of `split`.
        seed: decides the order, and which of several captions a clip gets.
    """

    count: int = 100
    split: str | None = None
    captions: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class Chosen:
    """The clips that a selection gives, and as many other real clips of the same split if there are."""

    split: str
    clips: list[Clip]
    others: list[Clip]


def choose_clips(available: StoreReader, selection: Selection, speech: bool = False) -> Chosen:
    """The clips to evaluate, from a store's clip table.

    The order depends on the seed and the clips alone, and a larger count only adds to it. Where some clips have labels,
    only those are taken.

    Args:
        available: the reader of the waveforms; only clips that it holds are chosen.

    Raises:
        UserError: no clip of the split has a caption, or the store lacks clips of the frozen list.
    """
    if selection.captions is not None:
        return _listed_clips(available, selection.captions, selection.seed, speech)
    tried = [selection.split] if selection.split else ["test", "validation"]
    for split in tried:
        clips = [_clip_of(row, selection.seed, speech) for row in _rows_of(available, [split])]
        usable = [clip for clip in clips if clip.text and (clip.transcript or not speech)]
        if usable:
            ordered = _in_turn([clip for clip in usable if clip.label] or usable, selection.seed)
            return Chosen(split, ordered[: selection.count], ordered[selection.count : 2 * selection.count])
    counts = {split: int((available.mask & available.table.among("split", [split])).sum()) for split in available.table.values("split")}
    splits = {split: count for split, count in counts.items() if count}
    needed = "a transcript" if speech else "a caption"
    hint = f"the store holds {splits}; choose another with --split" if splits else "no clip of the store has its waveform"
    raise UserError(f"no clip of the split {' or '.join(tried)} has {needed} to generate from; {hint}")


def _rows_of(available: StoreReader, splits: Collection[str]) -> Iterator[dict[str, Any]]:
    return available.table.take(np.flatnonzero(available.mask & available.table.among("split", splits)))


def _listed_clips(available: StoreReader, captions: Path, seed: int, speech: bool) -> Chosen:
    """The clips of a frozen caption list, with its captions."""
    frozen = read_captions(captions)
    numbers = sorted(number for number in available.table.numbers([clip.clip_id for clip in frozen]).values() if number in available)
    rows = {row["clip_id"]: row for row in available.table.take(np.array(numbers, np.int64))}
    missing = [clip.clip_id for clip in frozen if clip.clip_id not in rows]
    if missing:
        raise UserError(
            f"the store lacks {len(missing)} of the {len(frozen)} clips in {captions}: {some(missing)}; name the list's own store"
        )
    clips = []
    for clip in frozen:
        stored = _clip_of(rows[clip.clip_id], seed, speech)
        clips.append(replace(clip, corpus=stored.corpus, label=stored.label))
    wordless = [clip.clip_id for clip in clips if not (clip.transcript if speech else clip.text)]
    if wordless:
        raise UserError(f"{captions} has no {'transcript' if speech else 'caption'} for {some(wordless)}")
    splits = sorted({rows[clip.clip_id]["split"] for clip in clips})
    chosen = {clip.clip_id for clip in clips}
    same_split = _in_turn([_clip_of(row, seed, speech) for row in _rows_of(available, splits)], seed)
    return Chosen(", ".join(splits), clips, [clip for clip in same_split if clip.clip_id not in chosen][: len(clips)])


def _clip_of(row: Mapping[str, Any], seed: int, speech: bool) -> Clip:
    """A row of the clip table; of several captions one is drawn."""
    rng = np.random.default_rng([seed, zlib.crc32(row["clip_id"].encode())])
    texts = clip_texts(row)
    text = texts[int(rng.integers(len(texts)))]
    labels = list(row["labels"]) if row["labels"] is not None else []
    transcript = str(row["transcript"] or "") if speech else ""
    return Clip(row["clip_id"], row["corpus"], text or (VOICE if speech else ""), transcript, str(labels[0]) if labels else None)


def _in_turn(clips: Sequence[Clip], seed: int) -> list[Clip]:
    """One clip of each class, then the next of each, …; within a class in shuffled order."""
    classes: dict[str, list[Clip]] = {}
    for clip in sorted(clips, key=lambda c: (c.label or "", c.clip_id)):
        classes.setdefault(clip.label or "", []).append(clip)
    rng = np.random.default_rng(seed)
    queues = [[members[i] for i in rng.permutation(len(members))] for members in classes.values()]
    return [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
