"""JOB: corpora on disk → one validated clip table, the beginning of a feature store.

Readers list recordings, Ray Data reads their headers, and what is usable is cut into clips. Everything else
is kept in the table of rejected recordings with its reason, or counted as filtered where an option left it out.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
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
from pipelines.corpora.records import SPLITS, Recording
from pipelines.features import DEFAULT_SHARD_SIZE
from pipelines.tables import aligned
from stages.errors import UserError
from stages.files import Place

if TYPE_CHECKING:
    from pipelines.corpora.clips import Tally
    from pipelines.corpora.sources import Source
    from pipelines.features.store import FeatureStore
    from stages.audio import AudioConfig
    from stages.files import Place
    from stages.variants import Variant


# ------------------------------------------------------------------------------------------------------- the job


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
    from pipelines.corpora.clips import Cutter
    from pipelines.corpora.cut import Windows
    from pipelines.corpora.sources import choose, headers_of, list_sources, reject_twins
    from pipelines.features.store import CLIP_SCHEMA, REJECTED_SCHEMA, FeatureStore

    folders = [Path(os.path.abspath(folder)) for folder in data_dirs]
    windows = Windows(max_windows, min_seconds, seed)
    choices = {"limit": limit, "licences": list(licences), "keep_blacklisted": keep_blacklisted, "follow_links": follow_links}
    with tempfile.TemporaryDirectory(prefix="loa-ingest-") as temporary:
        spools = Path(temporary)
        sources, left_out = list_sources(folders, include, keep_blacklisted, follow_links, spools)
        recordings = {f"{source.corpus} in {source.root}": source.listed for source in sources}
        made_from = {"data": list(map(str, folders)), "windows": asdict(windows), **choices, "recordings": recordings}
        store = None if dry_run else FeatureStore.find(store_root, audio, seed, shard_size)
        if store is not None and (report := _earlier_report(store, made_from)):
            return report
        for number, source in enumerate(sources):
            choose(source, spools / f"{number}-kept", licences, limit, None if store is None else _known(store, source.corpus))
        headers = headers_of(sources, workers, reserve, lambda count: say("\n".join([*left_out, _reading(sources, count)])))
        reject_twins(sources, headers)
        made = Cutter(sources, headers, audio, windows, spools, {"clips": CLIP_SCHEMA, "rejected": REJECTED_SCHEMA}).made()
        if not made.clips.num_rows and store is None:
            raise UserError(_nothing_usable(folders, sources, made.tallies))
        report = _report(str(store_root), sources, made.tallies, store.num_clips if store else 0)
        if made.clips.num_rows and not dry_run:
            content = {"made_from": made_from, "corpora": [asdict(c) for c in report.corpora], "splits": report.splits}
            FeatureStore.create(store_root, audio, made.clips, made.rejected, seed, shard_size, content)
    return report


def _report(store: str, sources: Sequence[Source], tallies: Sequence[Tally], before: int) -> IngestReport:
    counts = tuple(tally.counts(source) for tally, source in zip(tallies, sources, strict=True))
    splits = sum((tally.splits for tally in tallies), Counter[str]())
    return IngestReport(store, counts, {split: splits[split] for split in SPLITS}, already=not splits.total(), before=before)


def _reading(sources: Sequence[Source], count: int) -> str:
    return f"{', '.join(source.corpus for source in sources)}: reading the headers of {count:,} recordings"


def _nothing_usable(folders: Sequence[Path], sources: Sequence[Source], tallies: Sequence[Tally]) -> str:
    kinds = sum((tally.rejected + tally.filtered + source.filtered for tally, source in zip(tallies, sources, strict=True)), Counter[str]())
    found = next((tally.first for tally in tallies if tally.first), None)
    first = f"; the first is {found.path} ({found.reason})" if found else ""
    return (
        f"nothing in {_names(folders)} can be used. Found: {'; '.join(corpora.LAYOUTS[source.corpus] for source in sources)}. "
        f"Rejected: {reasons(dict(kinds.most_common(4)))}{first}"
    )


def _known(store: FeatureStore, corpus: str) -> Callable[[Recording], bool]:
    """Whether a store has a recording; then it keeps its clips, whatever its file holds now.

    It is known by its id, or by its file: of `dup.wav` the id changes when `dup.flac` comes beside it.
    """
    from pipelines.corpora.spool import Hashes

    ids, paths = (Hashes(store.table.recordings(corpus, column)) for column in ("recording", "path"))
    return lambda r: r.recording_id in ids or (r.seconds is None and r.start == 0 and r.path in paths)


def _earlier_report(store: FeatureStore, made_from: Mapping[str, Any]) -> IngestReport | None:
    """The report of the ingest that took the same recordings, None when there was none."""
    for part in reversed(store.parts):
        if part.report.get("made_from") == made_from:
            counts = tuple(CorpusCounts(**c) for c in part.report["corpora"])
            return IngestReport(store.root, counts, part.report["splits"], already=True)
    return None


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
