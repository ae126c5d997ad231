"""All recordings become clips: rows that are written as they come, with ids that are unique, and counts of what became of everything."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.corpora.counts import CorpusCounts
from pipelines.corpora.cut import Clip, Windows, cut, stretch
from pipelines.corpora.headers import Headers
from pipelines.corpora.records import CAPTION_TABLE, Recording, Rejected
from pipelines.corpora.sources import Source
from pipelines.corpora.spool import RowFile

if TYPE_CHECKING:
    from stages.audio import AudioConfig

MOST_WARNINGS = 10  # of one corpus
SHORT = "short"  # the kind of reason that --min-seconds gives; an option's doing, so filtered and not rejected


@dataclass
class Tally:
    """What became of the records of one source."""

    recordings: int = 0
    clips: int = 0
    seconds: float = 0.0  # of clips
    used_seconds: float = 0.0  # of recordings that have a clip
    captions: int = 0
    splits: Counter[str] = field(default_factory=Counter)  # clips
    filtered: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    first: Rejected | None = None
    tables: list[str] = field(default_factory=list)  # the first of the caption tables that were not used

    def use(self, record: Recording, clips: list[Clip], seconds: float) -> None:
        """Count a recording of `seconds` that gives these clips."""
        self.recordings += 1
        self.clips += len(clips)
        self.seconds += sum(clip.seconds for clip in clips)
        self.used_seconds += seconds
        self.captions += len(clips) * len(record.captions)
        self.splits[record.split] += len(clips)

    def reject(self, rejected: Rejected) -> None:
        """Count what cannot be used."""
        self.rejected[rejected.kind] += 1
        self.first = self.first or rejected
        if rejected.kind == CAPTION_TABLE and len(self.tables) < MOST_WARNINGS:
            self.tables.append(f"{rejected.path}: {rejected.reason}")

    def counts(self, source: Source) -> CorpusCounts:
        """As the report has them."""
        return CorpusCounts(
            source.corpus,
            str(source.root),
            recordings=self.recordings,
            clips=self.clips,
            hours=self.seconds / 3600,
            hours_left_out=max(0.0, (self.used_seconds - self.seconds) / 3600),
            captions=self.captions,
            filtered=dict(source.filtered + self.filtered),
            rejected=dict(self.rejected.most_common()),
            warnings=self._warnings(),
        )

    def _warnings(self) -> list[str]:
        """What counts alone would hide: tables of captions that were not used, and a corpus without any recording."""
        more = self.rejected[CAPTION_TABLE] - len(self.tables)
        tables = [*self.tables, f"and {more:,} more"] if more else self.tables
        if self.clips or self.first is None:
            return tables
        (kind, count) = self.rejected.most_common(1)[0]
        return [f"no recording can be used: {count:,} times {kind}; the first is {self.first.path}", *tables]


@dataclass(frozen=True)
class Made:
    """The clips of all sources, and what is rejected, as tables that are mapped into memory."""

    clips: pa.Table
    rejected: pa.Table
    tallies: list[Tally]


class Ids:
    """Keeps clip ids unique, holding in memory only those that several recordings want.

    The clips are cut twice where there are such ids: first to find them, by their hashes, then to settle whose they are.
    """

    def __init__(self) -> None:
        self._seen = array("q")
        self._hashes: np.ndarray | None = None  # of all ids, sorted; None until they are known
        self._repeated: set[int] = set()
        self._taken: dict[str, Recording] = {}

    def found_repeated(self) -> bool:
        """Whether there are ids to be settled, in another round."""
        if self._hashes is not None:
            return False
        self._hashes = np.sort(np.frombuffer(self._seen, np.int64))
        self._repeated = set(self._hashes[1:][self._hashes[1:] == self._hashes[:-1]].tolist())
        return bool(self._repeated)

    def holder(self, clips: list[Clip]) -> Recording | None:
        """The recording that has one of these ids already."""
        return next((self._taken[clip.clip_id] for clip in clips if clip.clip_id in self._taken), None)

    def wanted(self, clips: list[Clip]) -> bool:
        """Whether one of these ids, which were made anew, is any recording's."""
        assert self._hashes is not None
        hashes = np.array([hash(clip.clip_id) for clip in clips])
        return self.holder(clips) is not None or bool(np.isin(hashes, self._hashes).any())

    def take(self, record: Recording, clips: list[Clip], anew: bool = False) -> None:
        """Give the ids of these clips to a recording."""
        if self._hashes is None:
            self._seen.extend(hash(clip.clip_id) for clip in clips)
            return
        self._taken.update((clip.clip_id, record) for clip in clips if anew or hash(clip.clip_id) in self._repeated)


@dataclass(frozen=True)
class Cutter:
    """Cuts every recording of the sources into clips.

    Args:
        folder: for the rows, which are mapped from there.
        schemas: of the tables "clips" and "rejected".
    """

    sources: Sequence[Source]
    headers: Headers
    audio: AudioConfig
    windows: Windows
    folder: Path
    schemas: Mapping[str, pa.Schema]

    def made(self) -> Made:
        """The clips, and what is rejected, in the order in which they are listed."""
        ids = Ids()
        made = self._round("first", ids)
        return self._round("second", ids) if ids.found_repeated() else made

    def _round(self, name: str, ids: Ids) -> Made:
        (folder := self.folder / name).mkdir()
        tallies = []
        with RowFile(folder / "clips", self.schemas["clips"]) as rows, RowFile(folder / "rejected", self.schemas["rejected"]) as lost:
            for source in self.sources:
                tallies.append(tally := Tally())
                for record in source.records:
                    result = record if isinstance(record, Rejected) else self._clips_of(record, ids)
                    if isinstance(result, list):
                        recording = result[0].recording
                        tally.use(recording, result, stretch(recording, self.headers[recording.path].seconds)[1])
                        for clip in result:
                            rows.add(clip.row())
                    elif result.kind == SHORT and isinstance(record, Recording):
                        tally.filtered[SHORT] += 1
                    else:
                        tally.reject(result)
                        lost.add(asdict(result))
        return Made(rows.table(), lost.table(), tallies)

    def _clips_of(self, record: Recording, ids: Ids) -> list[Clip] | Rejected:
        """The clips of a recording, with ids that no other has, or why there are none."""
        file = self.headers[record.path]
        if file.problem:
            return record.rejected(file.problem)
        result = cut(record, file.seconds, self.audio, self.windows)
        if isinstance(result, Rejected):
            return result
        other = ids.holder(result)
        if other is None:
            ids.take(record, result)
            return result
        if other.path == record.path:
            return record.rejected("duplicate id: listed twice")
        # Another sound of this name: its content tells it from the first.
        renamed = replace(record, recording_id=f"{record.recording_id}-{record.content[:8]}")
        result = cut(renamed, file.seconds, self.audio, self.windows)
        if isinstance(result, Rejected):
            return result
        if ids.wanted(result):
            return renamed.rejected("duplicate id: its content is that of another recording of this name")
        ids.take(renamed, result, anew=True)
        return result
