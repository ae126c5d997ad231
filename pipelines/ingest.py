"""JOB: corpora on disk → one validated clip table, the beginning of a feature store.

Readers list recordings, Ray Data reads their headers, and what is usable is cut into clips. Everything else
is kept in the table of rejected recordings with its reason, or counted as filtered where an option left it out.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from friendly import friendly
from options import (
    AS_NEEDED,
    Reservation,
    WorkerRange,
    next_step,
    tiny_option,
    tracking_option,
    variant_option,
    work_option,
    worker_options,
)
from pipelines import corpora
from pipelines.corpora.counts import CorpusCounts, IngestReport, reasons
from pipelines.corpora.cut import Clip, Windows, cut, stretch
from pipelines.corpora.records import CAPTION_TABLE, SPLITS, Record, Recording, Rejected
from pipelines.corpora.twins import without_twins
from pipelines.features import DEFAULT_SHARD_SIZE
from pipelines.tables import aligned
from stages.errors import UserError
from stages.files import Place

if TYPE_CHECKING:
    from pipelines.corpora.headers import Probed
    from pipelines.features.store import FeatureStore
    from stages.audio import AudioConfig
    from stages.files import Place
    from stages.variants import Variant

MOST_WARNINGS = 10  # of one corpus
SHORT = "short"  # the kind of reason that --min-seconds gives; an option's doing, so filtered and not rejected


# ------------------------------------------------------------------------------------------------------- the job


@dataclass
class Source:
    """A corpus in its folder, and what its reader lists."""

    corpus: str
    root: Path
    records: list[Record]
    filtered: Counter[str] = field(default_factory=Counter)


def ingest(
    data_dirs: Iterable[str | Path],
    store_root: str | Path | Place,
    audio: AudioConfig,
    *,
    max_windows: int | None = None,
    min_seconds: float = 0.0,
    licences: Sequence[str] = (),
    limit: int | None = None,
    keep_blacklisted: bool = False,
    include: Sequence[str] = (),
    follow_links: bool = False,
    seed: int = 0,
    shard_size: int = DEFAULT_SHARD_SIZE,
    workers: WorkerRange = None,
    reserve: Reservation = AS_NEEDED,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> IngestReport:
    """Make the clip table of a new feature store, or add to one the recordings that it lacks.

    What a store has stays as it is; a store made from the same recordings is left alone.

    Args:
        data_dirs: folders with corpora in their published layouts, or with any sound (`corpora.discover`).
        store_root: folder or fsspec URL of the store.
        max_windows: most clips of one recording, drawn by its id and the seed; None takes all.
        min_seconds: shorter recordings and windows are left out.
        licences: shell patterns, one of which a recording's licence must match, whatever the case; () takes all.
        limit: most recordings per corpus, chosen by a hash of their ids; None takes all.
        keep_blacklisted: use what WavCaps' blacklists name.
        include: corpora to read that are read only when asked for (`corpora.OPT_IN`).
        follow_links: use recordings to which links lead out of their corpus.
        seed: of the shuffle that deals clips to shards, and of the windows.
        workers: how many read headers, or the smallest and largest number; 0 reads them in this process.
        reserve: what each of them reserves, in place of one CPU.
        dry_run: report without writing.
        say: is told what happens, line by line.

    Raises:
        UserError: nothing usable was found, or the store has other settings.
    """
    from pipelines.corpora.headers import probe_headers
    from pipelines.features.store import FeatureStore

    folders = [Path(os.path.abspath(folder)) for folder in data_dirs]
    windows = Windows(max_windows, min_seconds, seed)
    sources, left_out = _listed(folders, include, keep_blacklisted, follow_links)
    choices = {"limit": limit, "licences": list(licences), "keep_blacklisted": keep_blacklisted, "follow_links": follow_links}
    recordings = {f"{source.corpus} in {source.root}": _digest(source.records) for source in sources}
    made_from = {"data": list(map(str, folders)), "windows": asdict(windows), **choices, "recordings": recordings}
    store = None if dry_run else FeatureStore.find(store_root, audio, seed, shard_size)
    if store is not None and (report := _earlier_report(store, made_from)):
        return report

    for source in sources:
        _filter(source, licences, limit, store)
    paths = sorted({r.path for source in sources for r in source.records if isinstance(r, Recording)})
    names = ", ".join(source.corpus for source in sources)
    say("\n".join([*left_out, f"{names}: reading the headers of {len(paths):,} recordings"]))
    _without_twins(sources, probed := probe_headers(paths, workers, reserve))
    clips, rejected, counts = _clips_of_all(sources, probed, audio, windows)
    if not clips and store is None:
        raise UserError(_nothing_usable(folders, sources, rejected))
    splits = Counter(clip.recording.split for clip in clips)
    before = store.num_clips if store else 0
    report = IngestReport(str(store_root), tuple(counts), {split: splits[split] for split in SPLITS}, not clips, before)
    if clips and not dry_run:
        _write(report, clips, rejected, made_from, audio, seed, shard_size)
    return report


def _write(
    report: IngestReport,
    clips: Sequence[Clip],
    rejected: Sequence[Rejected],
    made_from: Mapping[str, Any],
    audio: AudioConfig,
    seed: int,
    shard_size: int,
) -> None:
    import pyarrow as pa

    from pipelines.features.store import CLIP_SCHEMA, REJECTED_SCHEMA, FeatureStore

    clip_table = pa.Table.from_pylist([clip.row() for clip in clips], schema=CLIP_SCHEMA)
    rejected_table = pa.Table.from_pylist([asdict(r) for r in rejected], schema=REJECTED_SCHEMA)
    content = {"made_from": made_from, "corpora": [asdict(c) for c in report.corpora], "splits": report.splits}
    FeatureStore.create(report.store, audio, clip_table, rejected_table, seed, shard_size, content)


def _listed(folders: Sequence[Path], include: Sequence[str], keep_blacklisted: bool, follow_links: bool) -> tuple[list[Source], list[str]]:
    """What the readers find, and a sentence on each corpus that is read only when `include` names it."""
    roots, left_out = corpora.wanted(folders, include, follow_links)
    return [Source(name, root, list(corpora.read(name, root, keep_blacklisted, follow_links))) for name, root in roots], left_out


def _nothing_usable(folders: Sequence[Path], sources: Sequence[Source], rejected: Sequence[Rejected]) -> str:
    kinds = Counter(r.kind for r in rejected) + sum((source.filtered for source in sources), Counter[str]())
    first = f"; the first is {rejected[0].path} ({rejected[0].reason})" if rejected else ""
    return (
        f"nothing in {_names(folders)} can be used. Found: {'; '.join(corpora.LAYOUTS[source.corpus] for source in sources)}. "
        f"Rejected: {reasons(dict(kinds.most_common(4)))}{first}"
    )


def _filter(source: Source, licences: Sequence[str], limit: int | None, store: FeatureStore | None) -> None:
    """Leave out what options exclude and what the store has, and count it."""
    recordings = [r for r in source.records if isinstance(r, Recording)]
    kept = {r.recording_id for r in recordings}
    if licences:
        patterns = [pattern.casefold() for pattern in licences]
        fit = {r.recording_id for r in recordings if any(fnmatch.fnmatchcase(r.licence.casefold(), p) for p in patterns)}
        source.filtered["other licence"] += sum(r.recording_id not in fit for r in recordings)
        kept &= fit
    if limit is not None:
        chosen = set(sorted(kept, key=lambda i: hashlib.sha256(i.encode()).digest())[:limit])
        source.filtered["over the limit"] += sum(r.recording_id in kept - chosen for r in recordings)
        kept = chosen
    source.records = [r for r in source.records if isinstance(r, Rejected) or r.recording_id in kept]
    source.filtered = +source.filtered
    if store is not None:
        _forget_known(store, source)


def _without_twins(sources: Sequence[Source], probed: Mapping[str, Probed]) -> None:
    """Give every recording its content, and reject twins across all sources."""
    found = [replace(r, content=probed[r.path].content) for source in sources for r in source.records if isinstance(r, Recording)]
    clean = iter(without_twins(found, {path: file.seconds for path, file in probed.items()}))
    for source in sources:
        source.records = [next(clean) if isinstance(r, Recording) else r for r in source.records]


def _clips_of_all(
    sources: Iterable[Source], probed: Mapping[str, Probed], audio: AudioConfig, windows: Windows
) -> tuple[list[Clip], list[Rejected], list[CorpusCounts]]:
    """The clips of all corpora, what is rejected, and how many of each there are."""
    clips: list[Clip] = []
    rejected: list[Rejected] = []
    counts: list[CorpusCounts] = []
    taken: dict[str, Recording] = {}
    for source in sources:
        kept, lost, used_hours = _clips_of(source, probed, audio, windows, taken)
        counts.append(_count(source, kept, lost, used_hours))
        clips += kept
        rejected += lost
    return clips, rejected, counts


def _clips_of(
    source: Source, probed: Mapping[str, Probed], audio: AudioConfig, windows: Windows, taken: dict[str, Recording]
) -> tuple[list[Clip], list[Rejected], float]:
    """A corpus' clips, what is rejected, and the hours of the recordings used; `taken` has the clip ids so far, and grows."""
    clips: list[Clip] = []
    rejected: list[Rejected] = []
    hours = 0.0
    for record in source.records:
        if isinstance(record, Rejected):
            rejected.append(record)
            continue
        file = probed[record.path]
        result = record.rejected(file.problem) if file.problem else cut(record, file.seconds, audio, windows)
        if isinstance(result, list) and (other := next((taken[c.clip_id] for c in result if c.clip_id in taken), None)):
            if other.path == record.path:
                result = record.rejected("duplicate id: listed twice")
            else:  # another sound of this name: its content tells it from the first
                record = replace(record, recording_id=f"{record.recording_id}-{record.content[:8]}")
                result = cut(record, file.seconds, audio, windows)
        if isinstance(result, Rejected):
            if result.kind == SHORT:
                source.filtered[SHORT] += 1
            else:
                rejected.append(result)
            continue
        if any(clip.clip_id in taken for clip in result):
            rejected.append(record.rejected("duplicate id: its content is that of another recording of this name"))
            continue
        taken.update((clip.clip_id, record) for clip in result)
        hours += stretch(record, file.seconds)[1] / 3600
        clips += result
    return clips, rejected, hours


def _count(source: Source, clips: Sequence[Clip], rejected: Sequence[Rejected], used_hours: float) -> CorpusCounts:
    hours = sum(clip.seconds for clip in clips) / 3600
    return CorpusCounts(
        source.corpus,
        str(source.root),
        recordings=len({clip.recording.recording_id for clip in clips}),
        clips=len(clips),
        hours=hours,
        hours_left_out=max(0.0, used_hours - hours),
        captions=sum(len(clip.recording.captions) for clip in clips),
        filtered=dict(source.filtered),
        rejected=dict(Counter(r.kind for r in rejected).most_common()),
        warnings=_warnings(clips, rejected),
    )


def _warnings(clips: Sequence[Clip], rejected: Sequence[Rejected]) -> list[str]:
    """What counts alone would hide: tables of captions that were not used, and a corpus without any recording."""
    tables = [f"{r.path}: {r.reason}" for r in rejected if r.kind == CAPTION_TABLE]
    more = [f"and {len(tables) - MOST_WARNINGS:,} more"] if len(tables) > MOST_WARNINGS else []
    if clips or not rejected:
        return tables[:MOST_WARNINGS] + more
    (kind, count), first = Counter(r.kind for r in rejected).most_common(1)[0], rejected[0]
    return [f"no recording can be used: {count:,} times {kind}; the first is {first.path}", *tables[:MOST_WARNINGS], *more]


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


def _forget_known(store: FeatureStore, source: Source) -> None:
    """Leave out the recordings that a store has; they keep their clips, whatever their files hold now.

    They are known by their id, or by their file: of `dup.wav` the id changes when `dup.flac` comes beside it.
    """
    ids, paths = store.table.recordings(source.corpus)

    def has(record: Recording) -> bool:
        return record.recording_id in ids or (record.seconds is None and record.start == 0 and record.path in paths)

    records = [r for r in source.records if isinstance(r, Rejected) or not has(r)]
    source.filtered["in the store already"] += len(source.records) - len(records)
    source.records, source.filtered = records, +source.filtered


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
@click.option("--max-windows", type=click.IntRange(min=1), metavar="N", help="Draw at most N clips of a long recording.  [default: all]")
@click.option(
    "--min-seconds", type=click.FloatRange(min=0), default=0.0, metavar="S", help="Leave out what is shorter.  [default: leave out nothing]"
)
@click.option(
    "--licences",
    multiple=True,
    metavar="PATTERN",
    help="Use recordings of these licences alone, e.g. 'CC0*'; * is any text. May be repeated.  [default: all]",
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Use only N recordings of each corpus, for a first try.  [default: all]"
)
@click.option(
    "--keep-blacklisted", is_flag=True, help="Keep the recordings on WavCaps' blacklists, which occur in test sets of other corpora."
)
@click.option(
    "--include",
    type=click.Choice(corpora.OPT_IN),
    multiple=True,
    help="Read this corpus, too, which is left out otherwise. May be repeated.  [default: none]",
)
@click.option("--follow-links", is_flag=True, help="Use recordings outside of DIR to which links in it lead.")
@click.option("--seed", default=0, show_default=True, help="Seed of the shuffle that assigns clips to shards, and of --max-windows.")
@click.option(
    "--shard-size", type=click.IntRange(min=1), default=DEFAULT_SHARD_SIZE, show_default=True, metavar="N", help="Clips per shard."
)
@worker_options
@tracking_option
@click.option("--dry-run", is_flag=True, help="Say what would be made and how large the features would be, without writing.")
@friendly
def main(
    folders: tuple[Path, ...],
    data: tuple[Path, ...],
    work: Place,
    variant: str,
    tiny: bool,
    clip_seconds: float | None,
    dry_run: bool,
    tracking_uri: str | None,
    **options: Any,
) -> None:
    """Make the clip table in --work from the corpora or recordings in DIR.

    DIR contains any mix of corpora in their published layouts (AudioSet, AudioCaps, WavCaps, VGGSound, Million Song Dataset,
    FMA, LJSpeech, GigaSpeech; MusicCaps and Clotho for evaluation alone), in it or one folder below, or simply recordings, with or
    without captions: as files, in WebDataset tars, or as a Hugging Face data set.
    """
    if not folders + data:
        raise UserError("name the folder that holds the recordings: `loa ingest DIR`")
    from stages.variants import resolve

    resolved = resolve(variant, tiny=tiny)
    if clip_seconds is not None:
        resolved = replace(resolved, audio=replace(resolved.audio, clip_seconds=clip_seconds))
    report = ingest(folders + data, work / "store", resolved.audio, dry_run=dry_run, say=click.echo, **options)
    if not report.already and not dry_run:
        from pipelines.features.store import FeatureStore
        from pipelines.features.summary import log_ingest
        from pipelines.tracking import opened_when_needed

        with opened_when_needed(tracking_uri, work=work, job="ingest", variant=resolved.name) as tracker:
            log_ingest(tracker(), FeatureStore.open(report.store), report.counts())
    click.echo("\n".join([report.table(), *_coverage(report)]))
    for warning in report.warnings():
        click.echo(f"WARNING: {warning}", err=True)
    click.echo(f"\n{report.summary()}")
    click.echo(_storage(report, resolved) if dry_run else f"{report.store}\n{next_step('ingest')}")


def _coverage(report: IngestReport) -> list[str]:
    """A sentence per published corpus: what is found, missing and broken of its published recordings."""
    sentences = (corpora.coverage(c.corpus, c.recordings, c.rejected) for c in report.corpora)
    return [sentence for sentence in sentences if sentence]


def _storage(report: IngestReport, variant: Variant) -> str:
    """What the features of a report's clips take, in words."""
    from stages.sizes import clip_bytes

    clips = report.counts()["clips"]
    series = {name: size * clips / 1e9 for name, size in clip_bytes(variant).items()}
    rows = [[name, f"{size:,.2f} GB"] for name, size in {**series, "all": sum(series.values())}.items()]
    return f"nothing was written; the features would take about\n{aligned(rows, indent='  ')}"


if __name__ == "__main__":
    main()
