"""The same sound in several places: what is held out anywhere leaves training, and training has every sound once."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from pipelines.corpora.cut import stretch
from pipelines.corpora.records import Record, Recording
from pipelines.corpora.spool import at


def changed_by_twins(recordings: Callable[[], Iterable[Recording]], file_seconds: Callable[[str], float]) -> dict[int, Record]:
    """What `without_twins` makes other of the recordings, by their places: it is given only those that have a twin.

    Args:
        recordings: all of them, each time anew in the same order; about 30 bytes of each are held in memory.
        file_seconds: length of the file at a path.
    """
    origins, contents, keys, training = array("q"), array("q"), array("q"), array("b")
    for r in recordings():
        origins.append(hash(r.origin) if r.origin else 0)
        contents.append(hash(r.content) if r.content else 0)
        keys.append(hash(key(r, file_seconds(r.path))) if r.content else 0)
        training.append(r.split == "train")
    origin, content, stretches = (np.frombuffer(values, np.int64) for values in (origins, contents, keys))
    train = np.frombuffer(training, np.int8).astype(bool)

    values, counts = np.unique(stretches[train & (stretches != 0)], return_counts=True)
    chosen = train & np.isin(stretches, values[counts > 1])  # equal hashes of unequal things only make the choice larger
    for names in (origin, content):
        both = np.intersect1d(names[train], names[~train])
        chosen |= np.isin(names, both[both != 0])
    places = np.flatnonzero(chosen)
    found = list(at(places, recordings()))
    result = without_twins(found, {r.path: file_seconds(r.path) for r in found})
    return {place: now for place, was, now in zip(places.tolist(), found, result, strict=True) if now is not was}


def key(recording: Recording, file_seconds: float) -> tuple[str, float, float, bool]:
    """Equal for recordings that are the same stretch of the same bytes."""
    start, seconds = stretch(recording, file_seconds)
    return recording.content, round(start, 2), round(seconds, 2), bool(recording.transcript)


def without_twins(recordings: Sequence[Recording], file_seconds: Mapping[str, float]) -> list[Record]:
    """The recordings, in their order, without training ones that are held out elsewhere or occur twice.

    Twins are known by their origin (AudioSet, AudioCaps and WavCaps share videos, and their splits do not agree) and by the
    bytes of their files. Of exact copies the one with most words stays and takes over the words of the others. Held-out
    recordings all stay: a published test set is whole.

    Args:
        file_seconds: length of each file, by path.
    """
    by_origin = {r.origin: r for r in recordings if r.origin and r.split != "train"}
    by_content: dict[str, list[Recording]] = {}
    for r in recordings:
        if r.content and r.split != "train":
            by_content.setdefault(r.content, []).append(r)

    def held_out(recording: Recording) -> Recording | None:
        if recording.split != "train":
            return None
        same_origin = by_origin.get(recording.origin)
        if same_origin is not None and same_origin.corpus != recording.corpus:
            return same_origin
        twins = by_content.get(recording.content, [])
        # Segments of one long file, dealt to splits by their own corpus, are no twins.
        return next((t for t in twins if t.corpus != recording.corpus or same(t) == same(recording)), None)

    def same(recording: Recording) -> tuple[str, float, float, bool]:
        return key(recording, file_seconds[recording.path])

    result: list[Record] = []
    copies: dict[tuple[str, float, float, bool], list[int]] = {}  # places in `result`
    for recording in recordings:
        twin = held_out(recording)
        if twin is not None:
            result.append(recording.rejected(f"held out: in the {twin.split} split of {twin.corpus}, as {twin.recording_id}"))
            continue
        if recording.content and recording.split == "train":
            copies.setdefault(same(recording), []).append(len(result))
        result.append(recording)
    for places in copies.values():
        if len(places) > 1:
            _merge(result, places)
    return result


def _merge(result: list[Record], places: Sequence[int]) -> None:
    """Leave one of the copies at `places`, with the words of all."""
    copies = [(place, r) for place in places if isinstance(r := result[place], Recording)]
    kept_place, kept = max(copies, key=lambda copy: (bool(copy[1].captions), bool(copy[1].labels), -copy[0]))
    everyone = [kept, *(r for place, r in copies if place != kept_place)]
    for place, copy in copies:
        result[place] = copy.rejected(f"duplicate: the same sound as {kept.clip_id}, which has the words of both")
    result[kept_place] = replace(
        kept,
        captions=tuple(dict.fromkeys(caption for r in everyone for caption in r.captions)),
        labels=tuple(dict.fromkeys(label for r in everyone for label in r.labels)),
        licence="; ".join(dict.fromkeys(r.licence for r in everyone if r.licence)),
    )
