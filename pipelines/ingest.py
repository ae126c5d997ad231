"""JOB: corpora on disk → one validated clip table, the beginning of a feature store.

Readers list recordings, Ray Data reads their headers, and what is usable is cut into clips. Everything else
is kept in the table of rejected recordings with its reason.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from options import friendly, next_step, tiny_option, variant_option, work_option
from pipelines import corpora
from pipelines.corpora.records import Record, Recording, Rejected
from pipelines.features import DEFAULT_SHARD_SIZE
from pipelines.tables import aligned
from stages.errors import UserError
from stages.files import Place

if TYPE_CHECKING:
    from pipelines.features.store import FeatureStore
    from stages.audio import AudioConfig
    from stages.files import Place

MAX_WINDOWS = 4
FEWEST_SAMPLES = 100  # a shorter recording is none; the reference refuses it too
SPEECH_TOLERANCE = 0.25  # seconds that may be missing at the end of a transcribed segment

Source = tuple[str, Path]  # corpus and root
Headers = Mapping[str, tuple[float, str]]  # path → (seconds, why it cannot be read, or "")


# ------------------------------------------------------------------------------------------------------- the report


@dataclass
class CorpusCounts:
    """What came of one corpus."""

    corpus: str
    root: str
    recordings: int = 0  # usable ones
    clips: int = 0
    hours: float = 0.0  # of clips
    captions: int = 0  # of clips
    rejected: dict[str, int] = field(default_factory=dict)  # by kind of reason


@dataclass(frozen=True)
class IngestReport:
    """What an ingest found."""

    store: str
    corpora: tuple[CorpusCounts, ...]
    splits: dict[str, int]  # clips by split
    already: bool = False  # nothing was done: the store has these recordings
    before: int = 0  # clips that the store had

    def counts(self) -> dict[str, float]:
        """Totals by name."""
        sums = {name: float(sum(getattr(c, name) for c in self.corpora)) for name in ("recordings", "clips", "hours", "captions")}
        return sums | {"rejected": float(sum(sum(c.rejected.values()) for c in self.corpora))}

    def summary(self) -> str:
        """One line on what came out."""
        total = self.counts()
        done = "already ingested: " if self.already else f"added to {self.before:,} clips: " if self.before else ""
        splits = ", ".join(f"{count:,} {split}" for split, count in self.splits.items())
        return f"{done}{total['clips']:,.0f} clips ({splits}), {total['hours']:.2f} h; {total['rejected']:,.0f} rejected"

    def table(self) -> str:
        """One line per corpus with its reasons of rejection, and the totals."""
        total = CorpusCounts("total", "", **{k: v for k, v in self.counts().items() if k != "rejected"})  # type: ignore[arg-type]
        rows = [["corpus", "recordings", "clips", "hours", "captions", "rejected"]]
        for counts in [*self.corpora, *([total] if len(self.corpora) > 1 else [])]:
            reasons = ", ".join(f"{n:,} {kind}" for kind, n in counts.rejected.items())
            rejected = f"{self.counts()['rejected']:,.0f}" if counts is total else reasons or "0"
            numbers = (f"{counts.recordings:,.0f}", f"{counts.clips:,.0f}", f"{counts.hours:,.2f}", f"{counts.captions:,.0f}")
            rows.append([counts.corpus, *numbers, rejected])
        return aligned(rows, remarks=1)


# ------------------------------------------------------------------------------------------- recordings become clips


@dataclass(frozen=True)
class Clip:
    """A stretch of a recording that becomes one row of the clip table."""

    clip_id: str
    recording: Recording
    start: float
    seconds: float

    def row(self) -> dict[str, Any]:
        """The row, in the columns of CLIP_SCHEMA."""
        r = self.recording
        return {
            "clip_id": self.clip_id,
            "corpus": r.corpus,
            "path": r.path,
            "start": self.start,
            "seconds": self.seconds,
            "captions": list(r.captions),
            "transcript": r.transcript,
            "labels": list(r.labels),
            "split": r.split,
            "licence": r.licence,
            "origin": r.origin,
            "content": getattr(r, "content", ""),
            "recording": r.recording_id,
        }


def cut(recording: Recording, file_seconds: float, audio: AudioConfig, max_windows: int = MAX_WINDOWS) -> list[Clip] | Rejected:
    """The clips of a recording whose file lasts `file_seconds`.

    Consecutive windows of a clip's length; the rest at the end becomes a window too when it is half a clip or more.
    Of more than `max_windows` evenly spread ones are taken. Transcribed speech is one clip or none.
    """
    clip_id = f"{recording.corpus}-{recording.recording_id}"

    def rejected(reason: str) -> Rejected:
        return Rejected(recording.corpus, recording.path, clip_id, reason)

    start, length = recording.start, recording.seconds
    if recording.precut and length is not None and not (file_seconds >= start + length / 2 and file_seconds > 1.2 * length):
        start, length = 0.0, None  # shorter than the place it was cut from, or just as long as the cutting
    available = file_seconds - start
    seconds = available if length is None else min(length, available)
    if seconds * audio.sample_rate < FEWEST_SAMPLES:
        late = f"outside the recording: starts at {start:g} s of {file_seconds:g} s"
        return rejected(f"empty: {seconds:.3f} s" if available > 0 else late)
    if recording.transcript:
        if length is not None and length - seconds > SPEECH_TOLERANCE:
            return rejected(f"outside the recording: ends at {start + length:g} s of {file_seconds:g} s")
        if seconds > audio.clip_seconds:
            return rejected(f"speech longer than a clip: {seconds:.2f} s, a clip lasts {audio.clip_seconds:g} s")
        return [Clip(clip_id, recording, start, seconds)]
    windows = int(seconds // audio.clip_seconds)
    if windows == 0 or seconds - windows * audio.clip_seconds >= audio.clip_seconds / 2:
        windows += 1
    chosen = np.unique(np.linspace(0, windows - 1, min(windows, max_windows)).round().astype(int)).tolist()
    return [
        Clip(
            f"{clip_id}-{window}" if windows > 1 else clip_id,
            recording,
            start + window * audio.clip_seconds,
            min(audio.clip_seconds, seconds - window * audio.clip_seconds),
        )
        for window in chosen
    ]


def without_leaks(recordings: Sequence[Recording]) -> list[Record]:
    """Reject training recordings whose sound another corpus holds out for validation or test.

    AudioSet, AudioCaps and WavCaps share many recordings, and their splits do not agree.
    """
    held_out: dict[str, Recording] = {r.origin: r for r in recordings if r.origin and r.split != "train"}
    result: list[Record] = []
    for recording in recordings:
        other = held_out.get(recording.origin) if recording.split == "train" else None
        if other is not None and other.corpus != recording.corpus:
            clip_id = f"{recording.corpus}-{recording.recording_id}"
            result.append(Rejected(recording.corpus, recording.path, clip_id, f"held out: in the {other.split} split of {other.corpus}"))
        else:
            result.append(recording)
    return result


# ------------------------------------------------------------------------------------------------------- the job


def ingest(
    data_dirs: Iterable[str | Path],
    store_root: str | Path | Place,
    audio: AudioConfig,
    *,
    max_windows: int = MAX_WINDOWS,
    limit: int | None = None,
    keep_blacklisted: bool = False,
    seed: int = 0,
    shard_size: int = DEFAULT_SHARD_SIZE,
    workers: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> IngestReport:
    """Make the clip table of a new feature store, or add to one the recordings that it lacks.

    What a store has stays as it is; a store made from the same recordings is left alone.

    Args:
        data_dirs: folders with corpora in their published layouts, or with any sound (`corpora.discover`).
        store_root: folder or fsspec URL of the store.
        max_windows: most clips of one recording.
        limit: most recordings per corpus, chosen by a hash of their ids; None takes all.
        keep_blacklisted: use what WavCaps' blacklists name.
        seed: of the shuffle that deals clips to shards.
        workers: CPUs that read headers; 0 reads them in this process.
        say: is told what happens, line by line.

    Raises:
        UserError: nothing usable was found, or the store has other settings.
    """
    import pyarrow as pa

    from pipelines.corpora.headers import probe_headers
    from pipelines.features.store import CLIP_SCHEMA, REJECTED_SCHEMA, FeatureStore

    folders = [Path(os.path.abspath(folder)) for folder in data_dirs]
    listed = _listed(folders, keep_blacklisted, limit)
    made_from = {
        "data": [str(folder) for folder in folders],
        "max_windows": max_windows,
        "limit": limit,
        "keep_blacklisted": keep_blacklisted,
        "recordings": {f"{corpus} in {root}": _digest(records) for (corpus, root), records in listed},
    }
    store = FeatureStore.find(store_root, audio, seed, shard_size)
    if store is not None and (report := _earlier_report(store, made_from)):
        return report

    clean = iter(without_leaks([r for _, records in listed for r in records if isinstance(r, Recording)]))
    sources = [(source, [next(clean) if isinstance(r, Recording) else r for r in records]) for source, records in listed]
    if store is not None:
        sources = _unknown(store, sources)
    paths = sorted({r.path for _, records in sources for r in records if isinstance(r, Recording)})
    say(f"{', '.join(corpus for (corpus, _), _ in listed)}: reading the headers of {len(paths):,} recordings")
    clips, rejected, counts = _clips_of_all(sources, probe_headers(paths, workers), audio, max_windows)
    if not clips and store is None:
        raise UserError(_nothing_usable(folders, [corpus for (corpus, _), _ in listed], rejected))
    splits = Counter(clip.recording.split for clip in clips)
    before = store.num_clips if store else 0
    report = IngestReport(
        str(store_root), tuple(counts), {split: splits[split] for split in ("train", "validation", "test")}, not clips, before
    )
    if clips:
        clip_table = pa.Table.from_pylist([clip.row() for clip in clips], schema=CLIP_SCHEMA)
        rejected_table = pa.Table.from_pylist([asdict(r) for r in rejected], schema=REJECTED_SCHEMA)
        content = {"made_from": made_from, "corpora": [asdict(c) for c in counts], "splits": report.splits}
        FeatureStore.create(store_root, audio, clip_table, rejected_table, seed, shard_size, content)
    return report


def _listed(folders: Sequence[Path], keep_blacklisted: bool, limit: int | None) -> list[tuple[tuple[str, Path], list[Record]]]:
    """What the readers find: (corpus, root) with its records. Raises UserError when there is no corpus and no recording."""
    roots = list(dict.fromkeys(source for folder in folders for source in corpora.discover(folder)))
    if not roots:
        layouts = "; ".join(corpora.LAYOUTS.values())
        raise UserError(f"{_names(folders)} contains no recordings; searched it and the folders directly below for {layouts}")
    return [(source, _limited(corpora.read(*source, keep_blacklisted=keep_blacklisted), limit)) for source in roots]


def _nothing_usable(folders: Sequence[Path], names: Sequence[str], rejected: Sequence[Rejected]) -> str:
    reasons = ", ".join(f"{n:,} {kind}" for kind, n in Counter(r.kind for r in rejected).most_common(4))
    return (
        f"nothing in {_names(folders)} can be used. Found: {'; '.join(corpora.LAYOUTS[name] for name in names)}. "
        f"Rejected: {reasons}; the first is {rejected[0].path} ({rejected[0].reason})"
    )


def _limited(records: Iterable[Record], limit: int | None) -> list[Record]:
    listed = list(records)
    if limit is None:
        return listed
    ids = sorted({r.recording_id for r in listed if isinstance(r, Recording)}, key=lambda i: hashlib.sha256(i.encode()).digest())
    chosen = set(ids[:limit])
    return [r for r in listed if isinstance(r, Rejected) or r.recording_id in chosen]


def _clips_of_all(
    sources: Iterable[tuple[tuple[str, Path], Sequence[Record]]],
    headers: Headers,
    audio: AudioConfig,
    max_windows: int,
) -> tuple[list[Clip], list[Rejected], list[CorpusCounts]]:
    """The clips of all corpora, what is rejected, and how many of each there are."""
    clips: list[Clip] = []
    rejected: list[Rejected] = []
    counts: list[CorpusCounts] = []
    taken: set[str] = set()
    for (corpus, root), records in sources:
        kept, lost = _clips_of(records, headers, audio, max_windows, taken)
        counts.append(_count(corpus, root, kept, lost))
        clips += kept
        rejected += lost
    return clips, rejected, counts


def _clips_of(
    records: Iterable[Record], headers: Headers, audio: AudioConfig, max_windows: int, taken: set[str]
) -> tuple[list[Clip], list[Rejected]]:
    """The clips of a corpus and what is rejected; `taken` are the clip ids in use so far, and grows."""
    clips: list[Clip] = []
    rejected: list[Rejected] = []
    for record in records:
        if isinstance(record, Rejected):
            rejected.append(record)
            continue
        seconds, problem = headers[record.path]
        clip_id = f"{record.corpus}-{record.recording_id}"
        result = Rejected(record.corpus, record.path, clip_id, problem) if problem else cut(record, seconds, audio, max_windows)
        if isinstance(result, list) and not taken.isdisjoint(clip.clip_id for clip in result):
            result = Rejected(record.corpus, record.path, clip_id, "duplicate id")
        if isinstance(result, Rejected):
            rejected.append(result)
            continue
        taken.update(clip.clip_id for clip in result)
        clips += result
    return clips, rejected


def _count(corpus: str, root: Path, clips: Sequence[Clip], rejected: Sequence[Rejected]) -> CorpusCounts:
    return CorpusCounts(
        corpus,
        str(root),
        recordings=len({clip.recording.recording_id for clip in clips}),
        clips=len(clips),
        hours=sum(clip.seconds for clip in clips) / 3600,
        captions=sum(len(clip.recording.captions) for clip in clips),
        rejected=dict(Counter(r.kind for r in rejected).most_common()),
    )


def _digest(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr(record).encode())
    return f"{sum(isinstance(r, Recording) for r in records)} recordings, {digest.hexdigest()[:16]}"


def _earlier_report(store: FeatureStore, made_from: Mapping[str, Any]) -> IngestReport | None:
    """The report of the ingest that took the same recordings, None when there was none."""
    for part in reversed(store.parts):
        if part.report.get("made_from") == made_from:
            counts = tuple(CorpusCounts(**c) for c in part.report["corpora"])
            return IngestReport(store.root, counts, part.report["splits"], already=True)
    return None


def _unknown(store: FeatureStore, sources: Sequence[tuple[Source, Sequence[Record]]]) -> list[tuple[Source, list[Record]]]:
    """What of the listed recordings the store lacks; those that it has keep their clips, whatever their files hold now."""
    known = store.table.recordings()

    def lacks(record: Record) -> bool:
        return isinstance(record, Rejected) or f"{record.corpus}-{record.recording_id}" not in known

    return [(source, [record for record in records if lacks(record)]) for source, records in sources]


def _names(folders: Sequence[Path]) -> str:
    return " and ".join(map(str, folders)) or "no folder"


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[DIR]...")
@click.option(
    "--data",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of recordings, like DIR. May be repeated.  [default: none]",
)
@work_option
@variant_option
@tiny_option
@click.option("--clip-seconds", type=click.FloatRange(min=0.64), metavar="S", help="Length of a clip.  [default: the variant's]")
@click.option(
    "--max-windows",
    type=click.IntRange(min=1),
    default=MAX_WINDOWS,
    show_default=True,
    metavar="N",
    help="Maximum number of clips cut from one recording.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Use only N recordings of each corpus, for a first try.  [default: all]"
)
@click.option(
    "--keep-blacklisted", is_flag=True, help="Keep the recordings on WavCaps' blacklists, which occur in test sets of other corpora."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the shuffle that assigns clips to shards.")
@click.option(
    "--shard-size", type=click.IntRange(min=1), default=DEFAULT_SHARD_SIZE, show_default=True, metavar="N", help="Clips per shard."
)
@click.option(
    "--workers", type=click.IntRange(min=0), metavar="N", help="CPUs that read headers; 0 reads in this process.  [default: all free ones]"
)
@friendly
def main(
    folders: tuple[Path, ...],
    data: tuple[Path, ...],
    work: Place,
    variant: str,
    tiny: bool,
    clip_seconds: float | None,
    max_windows: int,
    limit: int | None,
    keep_blacklisted: bool,
    seed: int,
    shard_size: int,
    workers: int | None,
) -> None:
    """Make the clip table in --work from the corpora or recordings in DIR.

    DIR contains any mix of corpora in their published layouts (AudioSet, AudioCaps, WavCaps, Million Song Dataset,
    LJSpeech, GigaSpeech), in it or one folder below, or simply recordings, with or without captions.
    """
    if not folders + data:
        raise UserError("name the folder that holds the recordings: `loa ingest DIR`")
    from stages.variants import resolve

    audio = resolve(variant, tiny=tiny).audio
    if clip_seconds is not None:
        audio = replace(audio, clip_seconds=clip_seconds)
    report = ingest(
        folders + data,
        work / "store",
        audio,
        max_windows=max_windows,
        limit=limit,
        keep_blacklisted=keep_blacklisted,
        seed=seed,
        shard_size=shard_size,
        workers=workers,
        say=click.echo,
    )
    click.echo(report.table())
    click.echo(f"\n{report.summary()}\n{report.store}\n{next_step('ingest')}")


if __name__ == "__main__":
    main()
