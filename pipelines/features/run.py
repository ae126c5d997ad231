"""Running a pass: one shard in one call, and all that the store lacks on Ray Data.

A unit of work is a shard. Features travel through the store's files; Ray only carries shard numbers and counts.
"""

from __future__ import annotations

import collections
import json
import logging
import platform
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from friendly import plain_sentence
from options import AS_NEEDED, Reservation, WorkerRange, in_this_process
from pipelines import cluster
from pipelines.features import precision
from pipelines.features.outcomes import Failed, Outcome, Rejected, describe
from pipelines.features.passes import Features, Pass, Row
from pipelines.features.report import PassReport, Progress
from pipelines.features.shard_work import Encode, ShardResult, Unit, make_shard
from pipelines.features.store import FeatureStore
from pipelines.tracking import Tracker
from stages.errors import AudioError, UserError

ATTEMPTS = 2  # at a shard whose worker process dies
RETRY_WAITS = (5.0, 30.0, 120.0)  # seconds before further attempts at shards that failed
LATEST, MOST_FAILURES = 16, 0.25  # of so many shards tried last, the share that may fail before the others wait, too
OTHERS = 2.0  # seconds between looks at the shards that another job is making
CANDIDATES = 4  # shards, and clips in each, among which a readable recording is looked for


# ------------------------------------------------------------------------------------------------------- on a worker


class ShardWorker:
    """The Ray Data callable: a row names a shard, the answer says what became of it.

    Ray Data repeats a row whose process dies, and drops it in the end; so an error of ours must not look like a death:
    it comes back as text, and the driver raises it.
    """

    def __init__(self, store: FeatureStore, work: Pass) -> None:
        self.store, self.work, self.loaded = store, work, False

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit = Unit(row["shard"], tuple(json.loads(row["series"])), row["clips"], row["remake"])
        try:
            if not self.loaded:
                # What it was given, not what its node has; without an encoder one thread, and so the same sums and bytes everywhere.
                threads, device = cluster.given() if self.work.encoder else (1, "cpu")
                torch.set_num_threads(threads)
                self.work.load(torch.device(device))
                self.loaded = True
            return self.make(unit).to_row()
        except Exception as error:
            return {"shard": unit.shard, "result": "", "sentence": plain_sentence(error) or "", "failure": traceback.format_exc()}

    def make(self, unit: Unit) -> ShardResult:
        """Make a shard, once this node has proved that it reads what the driver could."""
        try:
            self.work.prove()
        except (OSError, AudioError) as error:
            assert self.work.known is not None
            return ShardResult(unit.shard, unit.clips).not_made(
                f"{platform.node()} cannot read {self.work.known['path']} ({describe(error)}), which this command could read when it "
                "began: mount its storage on that node"
            )
        return _claimed(self.store, self.work, unit, self.work.encode)


def _claimed(store: FeatureStore, work: Pass, unit: Unit, encode: Encode) -> ShardResult:
    """Make a shard unless another job is at it, or has made it meanwhile."""
    with store.claim(unit.series, unit.shard, unit.remake) as series:
        if not series:
            return ShardResult(unit.shard, unit.clips, elsewhere=True)
        return make_shard(store, work, replace(unit, series=series), encode)


# ------------------------------------------------------------------------------------------------------ the whole pass


def execute(
    work: Pass,
    store: FeatureStore,
    *,
    workers: WorkerRange = None,
    reserve: Reservation = AS_NEEDED,
    limit_shards: int | None = None,
    shards: Iterable[int] | None = None,
    retry_rejected: str | None = None,
    retry_waits: Sequence[float] = RETRY_WAITS,
    progress: bool = True,
    tracker: Callable[[], Tracker] = Tracker.off,
) -> PassReport:
    """Make the shards of a pass that the store lacks, on the joined Ray cluster.

    A shard with a clip that fails is not made, and tried again after a wait. The report says what is left in the end.

    Args:
        workers: how many shards at once, or the smallest and largest number (`cluster.pool`); 0 for this process, without Ray.
        reserve: what each worker reserves, in place of what the pass needs.
        limit_shards: make at most this many shards, the first missing ones.
        shards: only these; by default all.
        retry_rejected: make shards again that rejected a clip for a reason with this part; "" takes every reason.
        retry_waits: seconds before each further attempt at what failed.
        progress: show a bar on stderr.
        tracker: opens the run that is told how far the pass is; called when the first shard is there.

    Raises:
        UserError: the store's audio settings or the recipe of a series differ, an input series is incomplete, or the
            workers of an encoder keep dying.
    """
    with store.working(f"loa preprocess {work.name}") as own:
        return _execute(work, own, workers, reserve, limit_shards, shards, retry_rejected, retry_waits, progress, tracker)


def _execute(
    work: Pass,
    store: FeatureStore,
    workers: WorkerRange,
    reserve: Reservation,
    limit_shards: int | None,
    shards: Iterable[int] | None,
    retry_rejected: str | None,
    retry_waits: Sequence[float],
    progress: bool,
    tracker: Callable[[], Tracker],
) -> PassReport:
    store.require_audio(work.audio, f"the {work.name} pass")
    for series in work.series:
        store.begin_series(series, work.recipe(series))
    units = select(store, work, shards, retry_rejected)
    report = PassReport(work.name, shards_skipped=len(_numbers(store, shards)) - len(units))
    units = units[:limit_shards]
    if work.reads and units:
        store.reader(work.reads, [unit.shard for unit in units])  # refuses now, not on a worker
    _find_known(store, work, units)
    with Progress(report, units, progress, tracker) as shown:
        pending, attempt = units, 0
        while pending:
            made, pending, elsewhere = _round(store, work, pending, workers, reserve, shown)
            if elsewhere and not pending:  # left to another job: is it through, or gone?
                pending = [unit for unit in select(store, work, elsewhere) if unit.shard in elsewhere]
                time.sleep(OTHERS if pending else 0)
                continue
            pending += elsewhere.values()
            attempt = 0 if made > len(pending) else attempt + 1
            if pending and attempt > len(retry_waits):
                break
            if pending:
                shown.wait(retry_waits[max(0, attempt - 1)])
    for series in work.series:
        store.compact(series)
    report.shards_left = len(pending) - report.shards_failed
    return report


def choose_precision(
    work: Pass, store: FeatureStore, given: str | None, workers: WorkerRange = None, reserve: Reservation = AS_NEEDED
) -> None:
    """Settle in which precision the encoder computes: as given, as its series began, or as suits the workers' device.

    Another one than the series began with is refused when the series is continued.
    """
    if not work.encoder:
        return
    recipes = store.recipes()
    known = next((recipes[name]["precision"] for name in work.series if "precision" in recipes.get(name, {})), None)
    device = _workers_device(work, workers, reserve)
    work.precision = given or known or precision.choose(device, work.fp16)
    work.made_on = str(device)


def _workers_device(work: Pass, workers: WorkerRange, reserve: Reservation) -> precision.Device:
    """The kind of device that encoders get, asked of a worker like theirs."""
    if in_this_process(workers):
        return precision.Device.here(reserve.gpus != 0)
    import ray

    pool = cluster.pool(work.needs, 1, None, reserve)
    cluster.await_room(pool, f"the {work.name} pass")

    @ray.remote(num_cpus=0, num_gpus=pool.num_gpus, memory=pool.memory or None)
    def device() -> precision.Device:
        return precision.Device.here(bool(pool.num_gpus))

    answer: precision.Device = ray.get(device.remote())
    return answer


def _round(
    store: FeatureStore, work: Pass, units: Sequence[Unit], workers: WorkerRange, reserve: Reservation, shown: Progress
) -> tuple[int, list[Unit], dict[int, Unit]]:
    """Try units once, but stop when too many of the latest fail; how many were made, which are left, and which other jobs are at."""
    made: set[int] = set()
    failed: set[int] = set()
    elsewhere: dict[int, Unit] = {}
    by_shard = {unit.shard: unit for unit in units}
    latest: collections.deque[bool] = collections.deque(maxlen=LATEST)
    for row in _outcomes(store, work, units, workers, reserve):
        _raise_failure(row)
        result = ShardResult.from_row(row)
        if result.elsewhere:
            elsewhere[result.shard] = by_shard[result.shard]
            continue
        (failed if result.failures else made).add(result.shard)
        shown.add(result)
        latest.append(bool(result.failures))
        if len(latest) == LATEST and sum(latest) > MOST_FAILURES * LATEST:
            break
    left = [unit for unit in units if unit.shard not in made and unit.shard not in elsewhere]
    return len(made), sorted(left, key=lambda unit: unit.shard in failed), elsewhere  # first what was not tried


def select(store: FeatureStore, work: Pass, shards: Iterable[int] | None = None, retry_rejected: str | None = None) -> list[Unit]:
    """The shards that a pass has to make, with the series that lack them; arguments as of `execute`."""
    numbers = _numbers(store, shards)
    lacking = {series: set(store.missing_shards(series)) for series in work.series}
    again: set[int] = set()
    if retry_rejected is not None:
        again = {shard for series in work.series for shard in _with_rejections(store, work, series, retry_rejected)}
        lacking = {series: missing | again for series, missing in lacking.items()}
    wanted = [shard for shard in numbers if any(shard in missing for missing in lacking.values())]
    return [Unit(shard, tuple(s for s in work.series if shard in lacking[s]), store.shard_count(shard), shard in again) for shard in wanted]


def _with_rejections(store: FeatureStore, work: Pass, series: str, part: str) -> Iterator[int]:
    """Shards of a series with a rejection whose reason has `part`, or whose input series have since gained clips."""
    inputs = [store.ledger(name) for name in work.reads]
    for shard, row in store.ledger(series).items():
        if any(part in rejection.reason for rejection in row.rejected):
            yield shard
        elif all(shard in ledger and ledger[shard].count > row.count + len(row.rejected) for ledger in inputs) and inputs:
            reader = store.reader(work.reads, [shard])
            if sum(work.wants(r) and r["clip_id"] in reader for r in store.shard_rows(shard)) > row.count + len(row.rejected):
                yield shard


def _numbers(store: FeatureStore, shards: Iterable[int] | None) -> list[int]:
    if shards is None:
        return list(range(store.num_shards))
    numbers = sorted(set(shards))
    if numbers and numbers[-1] >= store.num_shards:
        raise UserError(f"--shards names shard {numbers[-1]}; {store.root} has {store.num_shards}, 0 to {store.num_shards - 1}")
    return numbers


def _find_known(store: FeatureStore, work: Pass, units: Sequence[Unit]) -> None:
    """A recording that this process can read, so that every worker can prove that its node can, too."""
    for unit in units[:CANDIDATES]:
        for row in store.shard_rows(unit.shard)[:CANDIDATES]:
            work.known = row
            try:
                work.prove()
                return
            except (OSError, AudioError):
                work.known = None


def _outcomes(
    store: FeatureStore, work: Pass, units: Sequence[Unit], workers: WorkerRange, reserve: Reservation
) -> Iterator[dict[str, Any]]:
    """What became of every unit, as they finish. Without an encoder, units whose worker keeps dying are done under guard."""
    if not units:
        return
    if in_this_process(workers):
        yield from _here(store, work, units, reserve)
        return
    pool = cluster.pool(work.needs, len(units), workers, reserve)
    cluster.await_room(pool, f"the {work.name} pass")
    finished = set()
    for outcome in _on_ray_data(store, work, units, pool):
        finished.add(outcome["shard"])
        yield outcome
    for unit in units:
        if unit.shard not in finished:
            yield _claimed(store, work, unit, _guarded(work)).to_row()


def _here(store: FeatureStore, work: Pass, units: Sequence[Unit], reserve: Reservation) -> Iterator[dict[str, Any]]:
    """The same in this process, without Ray."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if not work.encoder else int(reserve.cpus or threads) or 1)
    try:
        work.load(torch.device("cuda" if work.encoder and reserve.gpus != 0 and torch.cuda.is_available() else "cpu"))
        for unit in units:
            yield _claimed(store, work, unit, work.encode).to_row()
    finally:
        torch.set_num_threads(threads)


def _on_ray_data(store: FeatureStore, work: Pass, units: Sequence[Unit], pool: cluster.Pool) -> Iterator[dict[str, Any]]:
    import ray
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    rows = [{"shard": unit.shard, "series": json.dumps(unit.series), "clips": unit.clips, "remake": unit.remake} for unit in units]
    worker = ShardWorker(store, work)
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
                fn_constructor_args=(store, work),
                compute=ActorPoolStrategy(min_size=pool.smallest, max_size=pool.largest),
                **pool.reserves(),
                max_restarts=len(rows),  # a worker outlives nodes that are lost; what ends it for good is a shard that kills it again
                max_task_retries=ATTEMPTS - 1,
            )
        else:
            dataset = dataset.map(
                lambda row: worker(row), compute=TaskPoolStrategy(size=pool.largest), **pool.reserves(), max_retries=ATTEMPTS - 1
            )
    try:
        yield from dataset.iter_rows()
    except ExecutionTimeoutError as error:
        raise UserError(
            f"the {work.name} pass is stalled: no worker with {pool.worker()} came to start, or a shard takes longer than "
            "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S; free the cluster, or give --workers or a longer time"
        ) from error
    except RayError as error:
        raise UserError(
            f"a worker of the {work.name} pass died {ATTEMPTS} times ({type(error).__name__}), most often for lack of memory; "
            f"finished shards are kept: try again with --workers {max(1, pool.largest // 2)}, --memory or a larger machine"
        ) from error


def _guarded(work: Pass) -> Encode:
    """`work.encode` with every clip in a process of its own: one that dies costs its own clip alone."""
    import ray
    from ray.exceptions import OutOfMemoryError, WorkerCrashedError

    @ray.remote(num_cpus=1, max_retries=0)
    def encode_one(row: Row, clip: Features) -> list[Outcome]:
        torch.set_num_threads(1)  # as in ShardWorker: the sums, and so the bytes, are the same
        return work.encode([row], [clip])

    def encode_alone(row: Row, clip: Features) -> list[Outcome]:
        for _ in range(ATTEMPTS):
            try:
                return list(ray.get(encode_one.remote(row, clip)))
            except OutOfMemoryError as error:
                return [Failed(f"{row['path']}: too little memory ({type(error).__name__})")]
            except WorkerCrashedError:
                pass
        return [Rejected(f"its decoder died {ATTEMPTS} times, alone in a process")]

    return lambda rows, clips: [outcome for row, clip in zip(rows, clips, strict=True) for outcome in encode_alone(row, clip)]


def _raise_failure(outcome: Mapping[str, Any]) -> None:
    if outcome["sentence"]:
        raise UserError(outcome["sentence"])
    if outcome["failure"]:
        raise RuntimeError(f"shard {outcome['shard']} failed on a worker:\n{outcome['failure']}")
