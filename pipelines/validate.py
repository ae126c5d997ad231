"""JOB: check a folder of recordings or a feature store, without writing: which rows fail, why, and which command repairs.

Threads of this process share the work: decoding, checksums and reading leave Python's lock, so no Ray is needed.
"""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from friendly import friendly
from options import again, shown, work_option
from pipelines.tables import aligned
from stages.errors import AudioError, UserError

if TYPE_CHECKING:
    from pipelines.corpora import Recording, Rejected
    from pipelines.features.shards import LedgerRow
    from pipelines.features.store import FeatureStore

T = TypeVar("T")
R = TypeVar("R")

AT_ONCE = 4096  # items that wait for a thread
AFRESH = " --verify"  # has a pass make corrupt shards again, not only missing ones
# What a corpus leaves out on purpose; every other rejection is a failing row.
ON_PURPOSE = ("blacklisted", "no speech", "not listed", "held out")


@dataclass(frozen=True)
class Failure:
    """One row that fails."""

    part: str  # the corpus, or the series and shard
    row: str  # the recording, the line or the clip
    reason: str
    repair: str = ""  # the command that mends it

    @property
    def kind(self) -> str:
        """The part of the reason that reports count by."""
        return self.reason.partition(":")[0]


@dataclass
class Findings:
    """What a check found."""

    target: str
    checked: dict[str, int] = field(default_factory=dict)  # by what: recordings, shards, clips
    failures: list[Failure] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)  # on purpose, by kind of reason

    @property
    def repairs(self) -> list[str]:
        """The commands that mend what failed, each once."""
        return list(dict.fromkeys(failure.repair for failure in self.failures if failure.repair))

    def summary(self) -> str:
        """One sentence on what was checked and what fails."""
        checked = ", ".join(f"{count:,} {what}" for what, count in self.checked.items())
        kinds = Counter(failure.kind for failure in self.failures).most_common()
        failing = f"{len(self.failures):,} fail: {', '.join(f'{n:,} {kind}' for kind, n in kinds)}" if kinds else "all are sound"
        left_out = ", ".join(f"{n:,} {kind}" for kind, n in self.left_out.items())
        return f"{self.target}: checked {checked}; {failing}" + (f"; left out on purpose: {left_out}" if left_out else "")

    def table(self, most: int) -> str:
        """The first `most` failures, a line each."""
        rows = [[failure.part, failure.row, failure.reason] for failure in self.failures[:most]]
        more = len(self.failures) - len(rows)
        table = aligned([["where", "row", "why"], *rows], left=2, remarks=1)
        return table + (f"\n… and {more:,} more: --json FILE has all" if more > 0 else "")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self) | {"repairs": self.repairs}


def validate(target: str | Path, threads: int | None = None, progress: bool = True, follow_links: bool = False) -> Findings:
    """Check the feature store or the recordings at `target`, whichever is there. Nothing is written.

    Args:
        target: a feature store (folder or URL), a work folder with a store, or a folder of recordings.
        threads: how many share the work; None takes one per CPU of this process.
        progress: show a bar on stderr.
        follow_links: check recordings to which links lead out of their corpus, too.

    Raises UserError when there is neither a store nor a recording.
    """
    from pipelines.features.store import FeatureStore, NoStoreError

    workers = threads or len(os.sched_getaffinity(0))
    for place in (str(target), os.path.join(str(target), "store")):
        try:
            return check_store(FeatureStore.open(place), workers, progress)
        except NoStoreError:
            continue
    if "://" in str(target):
        raise UserError(f"{target} holds no feature store; recordings are checked in a folder, not behind a URL")
    return check_recordings(Path(target), workers, progress, follow_links)


# ------------------------------------------------------------------------------------------------------- recordings


def check_recordings(folder: Path, threads: int, progress: bool = True, follow_links: bool = False) -> Findings:
    """Read the metadata of every corpus in a folder, and decode every recording that it lists from beginning to end."""
    from pipelines import corpora
    from pipelines.corpora.records import Recording

    sources = corpora.wanted([folder], corpora.OPT_IN, follow_links)[0]
    findings = Findings(str(folder), {"rows": 0, "recordings": 0})
    listed: dict[str, list[Recording]] = {}
    left_out: Counter[str] = Counter()
    for source in sources:
        for record in corpora.read(*source, follow_links=follow_links):
            findings.checked["rows"] += 1
            if isinstance(record, Recording):
                listed.setdefault(record.path, []).append(record)
            elif record.kind in ON_PURPOSE:
                left_out[record.kind] += 1
            else:
                findings.failures.append(_rejected(record))
    findings.left_out = dict(left_out.most_common())
    paths = sorted(listed)
    findings.checked["recordings"] = len(paths)
    for path, (seconds, problem) in zip(paths, _in_threads(_decoded, paths, threads, "recordings", progress), strict=True):
        findings.failures += [failure for record in listed[path] if (failure := _failure(record, seconds, problem))]
    return findings


def _rejected(record: Rejected) -> Failure:
    return Failure(record.corpus, record.path, record.reason)


def _decoded(path: str) -> tuple[float, str]:
    """(seconds, "") of a recording that can be decoded to its end, or (0, why it cannot)."""
    from pipelines.corpora.headers import probe_header
    from stages.audio import check_audio

    problem = probe_header(path)[1]
    if problem:
        return 0.0, problem
    try:
        return check_audio(path), ""
    except (AudioError, OSError) as error:
        reason = str(error).removeprefix(path).strip()
        kind = next((kind for kind in ("silent", "truncated") if reason.startswith(f"is {kind}")), "damaged")
        return 0.0, f"{kind}: {reason.removeprefix(f'is {kind}').strip(': ')}"


def _failure(record: Recording, seconds: float, problem: str) -> Failure | None:
    if not problem and not record.precut and record.start >= seconds:
        problem = f"outside the recording: starts at {record.start:g} s of {seconds:g} s"
    return Failure(record.corpus, record.path, problem) if problem else None


# ------------------------------------------------------------------------------------------------------------ stores


def check_store(store: FeatureStore, threads: int, progress: bool = True) -> Findings:
    """Compare every shard of every series with its ledger row and the clip table, and decode every member."""
    from pipelines.features.shards import completing_command

    findings = Findings(store.root, {"series": 0, "shards": 0, "clips": 0})
    tasks: list[tuple[str, LedgerRow]] = []
    for series in store.recipes():
        findings.checked["series"] += 1
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            ledger = store.ledger(series)
            shards = sorted(ledger)
        findings.failures += [Failure(series, "ledger", str(warning.message)) for warning in warned]
        tasks += [(series, ledger[shard]) for shard in shards]
        findings.failures += [
            Failure(f"{series} {shard:06d}", f"{store.shard_count(shard):,} clips", "missing shard", completing_command(series))
            for shard in sorted(set(range(store.num_shards)) - set(shards))
        ]

    def check(task: tuple[str, LedgerRow]) -> tuple[int, list[Failure]]:
        return _check_shard(store, *task)

    for clips, failures in _in_threads(check, tasks, threads, "shards", progress):
        findings.checked["shards"] += 1
        findings.checked["clips"] += clips
        findings.failures += failures
    return findings


def _check_shard(store: FeatureStore, series: str, row: LedgerRow) -> tuple[int, list[Failure]]:
    """How many clips a shard holds, and what fails of it: its bytes, its list of clips, or the members of a clip."""
    from pipelines.features.shards import completing_command

    part, repair = f"{series} {row.shard:06d}", f"{completing_command(series)}{AFRESH}"
    try:
        damage = store.damage(series, row)
        if damage:
            return row.count, [Failure(part, f"{row.count:,} clips", damage, repair)]
        reader = store.reader([series], [row.shard])
        kept = list(reader.clip_ids)
        failures = [Failure(part, "list of clips", problem, repair) for problem in _list_problems(store, kept, row)]
        for clip_id in kept:
            try:
                problem = _not_finite(reader.read(clip_id))
            except (ValueError, OSError, RuntimeError) as error:  # of the store, of npy, of libsndfile
                problem = f"unreadable member: {error}"
            if problem:
                failures.append(Failure(part, clip_id, problem, repair))
        return len(kept), failures
    except (UserError, OSError) as error:
        return row.count, [Failure(part, f"{row.count:,} clips", f"unreadable shard: {error}", repair)]


def _list_problems(store: FeatureStore, kept: Sequence[str], row: LedgerRow) -> Iterator[str]:
    """Where the clips of a shard do not agree with the clip table, which has its share of them in order."""
    dealt = {clip["clip_id"]: position for position, clip in enumerate(store.shard_rows(row.shard))}
    rejected = [rejection.clip_id for rejection in row.rejected]
    strangers = [clip_id for clip_id in [*kept, *rejected] if clip_id not in dealt]
    if strangers:
        yield f"stranger: {strangers[0]} is not among the {len(dealt)} clips that the clip table deals to this shard"
    if len(dealt) != store.shard_count(row.shard):
        yield f"wrong count: the clip table has {len(dealt)} clips of this shard, store.json says {store.shard_count(row.shard)}"
    if len(kept) != row.count or len({*kept, *rejected}) != len(kept) + len(rejected):
        yield f"wrong count: {len(kept)} clips kept and {len(rejected)} rejected, the ledger says {row.count} kept"
    if not strangers and sorted(kept, key=dealt.__getitem__) != list(kept):
        yield "wrong order: the clips are not in the order of the clip table"


def _not_finite(members: dict[str, Any]) -> str:
    import numpy as np

    wrong = [name for name, value in members.items() if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all()]
    return f"not finite: {', '.join(wrong)}" if wrong else ""


# ----------------------------------------------------------------------------------------------------------- running


def _in_threads(call: Callable[[T], R], items: Iterable[T], threads: int, unit: str, progress: bool) -> Iterator[R]:
    """`call` of every item, in order, some thousand at a time, with a bar."""
    from tqdm import tqdm

    waiting = list(items)
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(waiting), unit=f" {unit}", disable=not progress) as bar:
        rest = iter(waiting)
        while chunk := list(islice(rest, AT_ONCE)):
            for result in pool.map(call, chunk):
                bar.update()
                yield result


@click.command()
@click.argument("target", required=False, metavar="[DIR|STORE]")
@work_option
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write all failures to FILE.  [default: none]",
)
@click.option("--show", type=click.IntRange(0), default=20, show_default=True, metavar="N", help="Failures to print.")
@click.option("--follow-links", is_flag=True, help="Check recordings outside of DIR to which links in it lead, too.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads that share the work.  [default: one per CPU]")
@friendly
def main(target: str | None, work: Path, json_file: Path | None, show: int, follow_links: bool, workers: int | None) -> None:
    """Check recordings or a feature store, without writing to them.

    DIR is a folder as `loa ingest` takes it: its metadata is read and every recording decoded from beginning to end. STORE is a
    feature store (by default the one in --work): checksums, lists of clips, and every member of every shard are checked.
    Exit code 1 says that something fails; the commands that repair it are printed.
    """
    findings = validate(target or str(work / "store"), workers, sys.stderr.isatty(), follow_links)
    if json_file is not None:
        from stages.files import write_json

        write_json(json_file, findings.to_dict())
    if findings.failures:
        click.echo(findings.table(show) + "\n")
    click.echo(findings.summary())
    for command in findings.repairs:
        click.echo(f"repair: {_in_full(command, findings.target if target else '')}")
    if findings.failures:
        if not findings.repairs:
            click.echo("mend or remove them; `loa ingest` leaves out what fails, each with its reason")
        sys.exit(1)


def _in_full(command: str, store: str) -> str:
    """A repairing command with the store that was named, or with this call's --work."""
    base = command.removesuffix(AFRESH)
    where = f"{base} --store {shlex.quote(shown(store))}" if store else again(base)
    return where + command[len(base) :]


if __name__ == "__main__":
    main()
