"""Running a pass: one shard in one call, and all that the store lacks on Ray Data.

A unit of work is a shard. Features travel through the store's files; Ray only carries shard numbers and counts.
"""

from __future__ import annotations

import collections
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

from options import plain_sentence
from pipelines import cluster
from pipelines.features.passes import Features, Outcome, Pass, Row, T, chunks
from pipelines.features.shards import ShardWriter
from pipelines.features.store import FeatureStore
from stages.errors import UserError

ATTEMPTS = 2  # at a shard whose worker process dies
OTHERS = 2.0  # seconds between looks at the shards that another job is making

Encode = Callable[[Sequence[Row], Sequence[Features]], list[Outcome]]


# ------------------------------------------------------------------------------------------------- one shard, one call


@dataclass(frozen=True)
class Unit:
    """A shard to be made: which of the pass's series lack it."""

    shard: int
    series: tuple[str, ...]
    clips: int  # of the clip table


def make_shard(store: FeatureStore, work: Pass, unit: Unit, encode: Encode) -> dict[str, Any]:
    """Encode the clips of one shard and write it; returns how many clips were kept and why others were not."""
    rows = [row for row in store.shard_rows(unit.shard) if work.wants(row)]
    reader = store.reader(work.reads, [unit.shard]) if work.reads else None
    if reader is not None:
        rows = [row for row in rows if row["clip_id"] in reader]  # the others were rejected, with a reason, before
    kept, reasons = 0, []
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(4))
        ahead = stack.enter_context(ThreadPoolExecutor(1))
        writers = [stack.enter_context(store.shard_writer(series, unit.shard)) for series in unit.series]

        def batches() -> Iterator[tuple[list[dict[str, Any]], list[Features]]]:
            for batch in chunks(rows, work.batch):
                yield batch, list(threads.map(reader.read, [row["clip_id"] for row in batch])) if reader else [{} for _ in batch]

        for batch, clips in _lookahead(batches(), ahead):
            for row, outcome in zip(batch, encode(batch, clips), strict=True):
                if isinstance(outcome, str):
                    reasons.append(outcome)
                else:
                    kept += 1
                _put(writers, row["clip_id"], outcome)
    return {"shard": unit.shard, "kept": kept, "reasons": json.dumps(reasons), "sentence": "", "failure": "", "elsewhere": False}


def _put(writers: Iterable[ShardWriter], clip_id: str, outcome: Outcome) -> None:
    for writer in writers:
        if isinstance(outcome, str):
            writer.reject(clip_id, outcome)
        else:
            writer.add(clip_id, outcome[writer.series])


def _lookahead(items: Iterator[T], pool: ThreadPoolExecutor) -> Iterator[T]:
    """The same items, each fetched while its predecessor is in use."""
    done = object()
    waiting = pool.submit(next, items, done)
    while (item := waiting.result()) is not done:
        waiting = pool.submit(next, items, done)
        yield item  # type: ignore[misc]


class ShardWorker:
    """The Ray Data callable: a row names a shard, the answer says what became of it.

    Ray Data repeats a row whose process dies, and drops it in the end; so an error of ours must not look like a death:
    it comes back as text, and the driver raises it.
    """

    def __init__(self, store: FeatureStore, work: Pass, threads: int) -> None:
        self.store, self.work, self.threads, self.loaded = store, work, threads, False

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit = Unit(row["shard"], tuple(json.loads(row["series"])), row["clips"])
        try:
            if not self.loaded:
                torch.set_num_threads(self.threads)
                self.work.load(torch.device("cuda" if torch.cuda.is_available() and self.work.encoder else "cpu"))
                self.loaded = True
            with self.store.claim(unit.series, unit.shard) as series:
                if not series:  # another job is at it, or has made it meanwhile
                    return {"shard": unit.shard, "kept": 0, "reasons": "[]", "sentence": "", "failure": "", "elsewhere": True}
                return make_shard(self.store, self.work, replace(unit, series=series), self.work.encode)
        except Exception as error:
            return {
                "shard": unit.shard,
                "kept": 0,
                "reasons": "[]",
                "sentence": plain_sentence(error) or "",
                "failure": traceback.format_exc(),
                "elsewhere": False,
            }


# ------------------------------------------------------------------------------------------------------ the whole pass


@dataclass
class PassReport:
    """What a pass did."""

    name: str
    clips: int = 0
    rejected: int = 0
    seconds: float = 0.0
    shards_done: int = 0
    shards_skipped: int = 0
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)

    def sentence(self) -> str:
        """The report as a line for people."""
        if not self.shards_done:
            return f"{self.name}: nothing to do, all {self.shards_skipped} shards exist"
        rate = self.clips / max(self.seconds, 1e-9)
        skipped = f" ({self.shards_skipped} existed)" if self.shards_skipped else ""
        line = f"{self.name}: {self.clips} clips in {self.shards_done} shards{skipped}, {self.seconds:.1f} s, {rate:.1f} clips/s"
        if self.rejected:
            common = "; ".join(f"{count} × {reason}" for reason, count in self.reasons.most_common(3))
            line += f"; {self.rejected} rejected: {common}" + (" …" if len(self.reasons) > 3 else "")
        return line


def execute(
    work: Pass, store: FeatureStore, *, workers: int | None = None, limit_shards: int | None = None, progress: bool = True
) -> PassReport:
    """Make the shards of a pass that the store lacks, on the joined Ray cluster.

    Args:
        workers: how many shards at once; by default what the cluster has room for.
        limit_shards: make at most this many shards, the first missing ones.
        progress: show a bar on stderr.

    Raises:
        UserError: the store's audio settings or the recipe of a series differ, an input series is incomplete, or the
            workers of an encoder keep dying.
    """
    with store.working(f"loa preprocess {work.name}") as own:
        return _execute(work, own, workers, limit_shards, progress)


def _execute(work: Pass, store: FeatureStore, workers: int | None, limit_shards: int | None, progress: bool) -> PassReport:
    started = time.monotonic()
    store.require_audio(work.audio, f"the {work.name} pass")
    for series in work.series:
        store.begin_series(series, work.recipe(series))
    pending = _missing(store, work)
    report = PassReport(work.name, shards_skipped=store.num_shards - len(pending))
    pending = pending[:limit_shards]
    if work.reads and pending:
        store.reader(work.reads, [unit.shard for unit in pending])  # refuses now, not on a worker
    with _bar(work, pending, progress) as bar:
        while pending:
            elsewhere = set()
            for outcome in _outcomes(store, work, pending, workers):
                _raise_failure(outcome)
                if outcome["elsewhere"]:
                    elsewhere.add(outcome["shard"])
                    continue
                reasons = json.loads(outcome["reasons"])
                report.shards_done += 1
                report.clips += outcome["kept"]
                report.rejected += len(reasons)
                report.reasons.update(_gist(reason) for reason in reasons)
                bar.update(store.shard_count(outcome["shard"]))
                bar.set_postfix_str(f"{report.shards_done} shards, {report.rejected} rejected", refresh=False)
            pending = [unit for unit in _missing(store, work) if unit.shard in elsewhere] if elsewhere else []
            if pending:
                time.sleep(OTHERS)
    for series in work.series:
        store.compact(series)
    report.seconds = time.monotonic() - started
    return report


def _missing(store: FeatureStore, work: Pass) -> list[Unit]:
    missing = {series: set(store.missing_shards(series)) for series in work.series}
    return [
        Unit(shard, tuple(series for series in work.series if shard in missing[series]), store.shard_count(shard))
        for shard in sorted(set().union(*missing.values()))
    ]


def _outcomes(store: FeatureStore, work: Pass, units: Sequence[Unit], workers: int | None) -> Iterator[dict[str, Any]]:
    """What became of every unit, as they finish. Without an encoder, units whose worker keeps dying are done under guard."""
    if not units:
        return
    resources = cluster.cluster_resources()
    pool = (cluster.encoder_pool if work.encoder else cluster.cpu_pool)(resources, len(units), workers)
    finished = set()
    for outcome in _on_ray_data(store, work, units, pool):
        finished.add(outcome["shard"])
        yield outcome
    for unit in units:
        if unit.shard not in finished:
            yield make_shard(store, work, unit, _guarded(work))


def _on_ray_data(store: FeatureStore, work: Pass, units: Sequence[Unit], pool: cluster.Pool) -> Iterator[dict[str, Any]]:
    import ray
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    rows = [{"shard": unit.shard, "series": json.dumps(unit.series), "clips": unit.clips} for unit in units]
    worker = ShardWorker(store, work, pool.threads)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A block is one shard: lost without an encoder only when its process died, and then done again under guard.
    context.max_errored_blocks = 0 if work.encoder else -1
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # a worker that dies is counted here, not told there
    with DataContext.current(context), warnings.catch_warnings():
        # The limits of retries have no named parameters yet; without them a row that kills its process comes back for ever.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        if work.encoder:
            dataset = dataset.map(
                ShardWorker,
                fn_constructor_args=(store, work, pool.threads),
                compute=ActorPoolStrategy(size=pool.size),
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus,
                max_restarts=ATTEMPTS - 1,
                max_task_retries=ATTEMPTS - 1,
            )
        else:
            dataset = dataset.map(lambda row: worker(row), compute=TaskPoolStrategy(size=pool.size), num_cpus=1, max_retries=ATTEMPTS - 1)
    try:
        yield from dataset.iter_rows()
    except ExecutionTimeoutError as error:
        raise UserError(
            f"the {work.name} pass is stalled: {pool.size} workers of {pool.num_cpus:g} CPUs and {pool.num_gpus:g} GPUs never started, or "
            "a shard takes longer than RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S; free the cluster, or give --workers or a longer time"
        ) from error
    except RayError as error:
        raise UserError(
            f"a worker of the {work.name} pass died {ATTEMPTS} times ({type(error).__name__}), most often for lack of memory; "
            f"finished shards are kept: try again with --workers {max(1, pool.size // 2)} or a larger machine"
        ) from error


def _guarded(work: Pass) -> Encode:
    """`work.encode` with every clip in a process of its own: one that dies costs its own clip alone."""
    import ray
    from ray.exceptions import OutOfMemoryError, WorkerCrashedError

    @ray.remote(num_cpus=1, max_retries=0)
    def encode_one(row: Row, clip: Features) -> list[Outcome]:
        torch.set_num_threads(1)  # as in ShardWorker: the sums, and so the bytes, are the same
        return work.encode([row], [clip])

    def encode(rows: Sequence[Row], clips: Sequence[Features]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for row, clip in zip(rows, clips, strict=True):
            try:
                outcomes += ray.get(encode_one.remote(row, clip))
            except (WorkerCrashedError, OutOfMemoryError) as error:
                outcomes.append(f"its decoder died ({type(error).__name__})")
        return outcomes

    return encode


def _raise_failure(outcome: Mapping[str, Any]) -> None:
    if outcome["sentence"]:
        raise UserError(outcome["sentence"])
    if outcome["failure"]:
        raise RuntimeError(f"shard {outcome['shard']} failed on a worker:\n{outcome['failure']}")


def _gist(reason: str) -> str:
    """A reason without the recording it is about, for counting."""
    return " ".join(word for word in reason.split() if "/" not in word and not any(c.isdigit() for c in word))


def _bar(work: Pass, units: Sequence[Unit], progress: bool) -> Any:
    quiet = not progress or not units
    patience = 0.5 if sys.stderr.isatty() else 30.0  # seconds between lines
    return tqdm(total=sum(unit.clips for unit in units), desc=work.name, unit="clip", disable=quiet, mininterval=patience)
