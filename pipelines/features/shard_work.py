"""One shard in one call: read its clips, encode them, and write the members beside the encoder."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.features.outcomes import Failed, Filtered, Kept, Outcome, Rejected, describe, is_failure
from pipelines.features.passes import Features, Pass, Row, chunks
from pipelines.features.reader import StoreReader
from pipelines.features.shards import ShardWriter
from pipelines.features.store import FeatureStore

WAITING = 4  # batches that wait for the writer at most: what a slow disk may cost in memory
IN_A_ROW = 16  # clips; so many failures in a row are a mount that is away, and the rest of the shard is not tried
GIVEN_UP = "failed: "  # begins the reason of a clip that failed and was rejected because the user said so

Encode = Callable[[Sequence[Row], Sequence[Features]], list[Outcome]]


@dataclass(frozen=True)
class Unit:
    """A shard to be made: which of the pass's series lack it."""

    shard: int
    series: tuple[str, ...]
    clips: int  # of the clip table
    remake: bool = False  # in place of one that exists


@dataclass
class ShardResult:
    """What became of a unit. Every clip of the shard is kept, rejected, filtered or failed."""

    shard: int
    clips: int = 0  # of the clip table
    kept: int = 0
    filtered: int = 0  # the pass does not want them, its input series lack them, or an option leaves them out
    left_out: list[str] = field(default_factory=list)  # reasons, of those that an option leaves out
    rejected: list[str] = field(default_factory=list)  # reasons
    failed: int = 0  # all others of a shard that could not be made
    failures: list[str] = field(default_factory=list)  # what went wrong; empty when the shard was made
    elsewhere: bool = False  # another job is at it: nothing was done
    seconds: float = 0.0  # of sound, kept
    measures: dict[str, list[float]] = field(default_factory=dict)  # of the kept clips, by name
    licences: dict[str, list[float]] = field(default_factory=dict)  # of the kept clips: how many, seconds

    def to_row(self) -> dict[str, Any]:
        """As it travels through Ray Data."""
        return {"shard": self.shard, "result": json.dumps(asdict(self)), "sentence": "", "failure": ""}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> ShardResult:
        """Inverse of `to_row`."""
        return cls(**json.loads(row["result"]))

    def not_made(self, failure: str) -> ShardResult:
        """The same shard when nothing of it was stored."""
        failures = [*self.failures, *([failure] if failure else [])]
        return ShardResult(self.shard, self.clips, filtered=self.filtered, failed=self.clips - self.filtered, failures=failures)

    def enter(self, row: Row, outcome: Outcome) -> None:
        """Count what became of a clip."""
        if isinstance(outcome, Failed):
            self.failures.append(outcome.reason)
            return
        if isinstance(outcome, Rejected):
            self.rejected.append(outcome.reason)
            return
        if isinstance(outcome, Filtered):
            self.filtered += 1
            self.left_out.append(outcome.reason)
            return
        self.kept += 1
        self.seconds += row["seconds"]
        words = [len(caption.split()) for caption in row["captions"]]
        for name, value in {**outcome.measures, "seconds": round(row["seconds"], 2)}.items():
            self.measures.setdefault(name, []).append(value)
        self.measures.setdefault("words", []).extend(words)
        licence = self.licences.setdefault(row["licence"], [0, 0.0])
        licence[0] += 1
        licence[1] += row["seconds"]


class _NotMade(Exception):
    """Leaves the writers so that they store nothing."""


def make_shard(store: FeatureStore, work: Pass, unit: Unit, encode: Encode) -> ShardResult:
    """Encode the clips of one shard and write it, unless something fails: then nothing is stored, and the result says why."""
    result = ShardResult(unit.shard, clips=unit.clips)
    try:
        _make(store, work, unit, encode, result)
    except _NotMade as reason:
        return result.not_made(str(reason))
    except Exception as error:
        if not is_failure(error):
            raise
        return result.not_made(describe(error))
    return result


def _make(store: FeatureStore, work: Pass, unit: Unit, encode: Encode, result: ShardResult) -> None:
    every = store.shard_rows(unit.shard)
    reader = store.reader(work.reads, [unit.shard]) if work.reads else None
    rows = [row for row in every if work.wants(row) and (reader is None or row["clip_id"] in reader)]
    result.clips, result.filtered = len(every), len(every) - len(rows)
    in_a_row = 0
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(5))
        writers = [stack.enter_context(store.shard_writer(series, unit.shard, unit.remake)) for series in unit.series]
        beside = stack.enter_context(_Beside(WAITING))
        for batch, clips in _batches(rows, work.batch, reader, pool):
            outcomes = encode(batch, clips)
            if work.reject_failed:
                outcomes = [Rejected(f"{GIVEN_UP}{o.reason}") if isinstance(o, Failed) else o for o in outcomes]
            for row, outcome in zip(batch, outcomes, strict=True):
                in_a_row = in_a_row + 1 if _is_world(outcome) else 0
                if in_a_row >= IN_A_ROW:
                    raise _NotMade(f"{in_a_row} clips in a row failed")
                result.enter(row, outcome)
            if result.failures:
                continue
            if work.encoder:
                beside.do(_put, writers, batch, outcomes)
            else:  # on one core another thread saves nothing, and the two wait for each other's lock
                _put(writers, batch, outcomes)
        beside.finish()
        if result.failures:
            raise _NotMade  # the writers go without storing anything


def _is_world(outcome: Outcome) -> bool:
    return isinstance(outcome, Failed) or (isinstance(outcome, Rejected) and outcome.reason.startswith(GIVEN_UP))


def _put(writers: Sequence[ShardWriter], rows: Sequence[Row], outcomes: Sequence[Outcome]) -> None:
    for row, outcome in zip(rows, outcomes, strict=True):
        for writer in writers:
            if isinstance(outcome, Kept):
                writer.add(row["clip_id"], outcome.members[writer.series])
            elif isinstance(outcome, (Rejected, Filtered)):
                writer.reject(row["clip_id"], outcome.reason)


def _batches(
    rows: Sequence[Row], size: int, reader: StoreReader | None, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[Row], list[Features]]]:
    """Batches of clips with their features, which are read while the batch before is in use."""
    batches = chunks(rows, size)
    if reader is None:
        for batch in batches:
            yield batch, [{}] * len(batch)
        return

    def read(batch: list[Row]) -> tuple[list[Row], list[Future[Features]]]:
        return batch, [pool.submit(reader.read, row["clip_id"]) for row in batch]

    ahead: collections.deque[tuple[list[Row], list[Future[Features]]]] = collections.deque()
    for batch in batches:
        ahead.append(read(batch))
        if len(ahead) > 1:
            yield _arrived(*ahead.popleft())
    for batch, features in ahead:
        yield _arrived(batch, features)


def _arrived(batch: list[Row], features: Iterable[Future[Features]]) -> tuple[list[Row], list[Features]]:
    return batch, [future.result() for future in features]


class _Beside:
    """Calls made in order in a thread of their own, at most `most` of them waiting; their errors are raised here."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._pool = ThreadPoolExecutor(1)
        self._waiting: collections.deque[Future[None]] = collections.deque()

    def do(self, call: Callable[..., None], *arguments: Any) -> None:
        """Have a call made; waits where too many do."""
        while len(self._waiting) >= self.most:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(call, *arguments))

    def finish(self) -> None:
        """Wait for all of them."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> _Beside:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
