"""What a pass did and how far it is: counts that add up, a bar, and metrics while it runs."""

from __future__ import annotations

import collections
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from pipelines.features.shard_work import ShardResult, Unit
from pipelines.tracking import Tracker
from stages.errors import UserError, some

# Bins of what is measured of clips; what lies beyond counts in the outermost.
EDGES = {
    "seconds": np.linspace(0.0, 12.0, 49),
    "words": np.arange(0.0, 61.0, 2.0),
    "loudness": np.arange(-80.0, 1.0, 2.0),  # dB of full scale
    "silence": np.linspace(0.0, 1.0, 21),  # share of frames
}

log = logging.getLogger(__name__)


@dataclass
class PassReport:
    """What a pass did. Of the clips it was given, each was kept, rejected, filtered or failed."""

    name: str
    given: int = 0  # clips of the shards that were tried
    clips: int = 0  # kept
    rejected: int = 0
    filtered: int = 0  # not wanted by the pass, absent from its input series, or left out by an option
    seconds: float = 0.0
    audio_seconds: float = 0.0  # of the kept clips
    shards_done: int = 0
    shards_skipped: int = 0
    shards_left: int = 0  # never tried, since too many failed
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)  # of rejected clips
    left_out: collections.Counter[str] = field(default_factory=collections.Counter)  # kinds of reasons of clips that an option leaves out
    made: list[int] = field(default_factory=list)  # shard numbers
    failing: dict[int, ShardResult] = field(default_factory=dict)  # shards that could not be made so far
    histograms: dict[str, np.ndarray] = field(default_factory=dict)  # counts in the bins of EDGES
    licences: dict[str, list[float]] = field(default_factory=dict)  # of the kept clips: how many, seconds

    def add(self, result: ShardResult) -> None:
        """Count an attempt at a shard."""
        if result.failures:
            self.failing[result.shard] = result
            return
        self.failing.pop(result.shard, None)
        self.shards_done += 1
        self.made.append(result.shard)
        self.clips += result.kept
        self.filtered += result.filtered
        self.rejected += len(result.rejected)
        self.given += result.clips
        self.audio_seconds += result.seconds
        self.reasons.update(map(gist, result.rejected))
        self.left_out.update(reason.partition(":")[0] for reason in result.left_out)
        for name, values in result.measures.items():
            self.histograms[name] = self.histograms.get(name, 0) + histogram(name, values)
        for licence, (clips, seconds) in result.licences.items():
            known = self.licences.setdefault(licence, [0, 0.0])
            known[0] += clips
            known[1] += seconds

    @property
    def failed(self) -> int:
        """Clips of the shards that could not be made."""
        return sum(result.failed for result in self.failing.values())

    @property
    def shards_failed(self) -> int:
        """Shards that could not be made."""
        return len(self.failing)

    def counts(self) -> dict[str, int]:
        """Clips in, and what became of them, which adds up. Raises AssertionError where it does not."""
        given = self.given + sum(result.clips for result in self.failing.values())
        filtered = self.filtered + sum(result.filtered for result in self.failing.values())
        counts = {"in": given, "kept": self.clips, "rejected": self.rejected, "filtered": filtered, "failed": self.failed}
        assert given == sum(counts.values()) - given, f"the counts of the {self.name} pass do not add up: {counts}"
        return counts

    def sentence(self) -> str:
        """The report for people: a line on the work, one on the clips."""
        if not self.shards_done and not self.failing:
            return f"{self.name}: nothing to do, all {self.shards_skipped} shards exist"
        elapsed = max(self.seconds, 1e-9)
        skipped = f" ({self.shards_skipped} existed)" if self.shards_skipped else ""
        speed = f"{self.clips / elapsed:.1f} clips/s, {self.audio_seconds / elapsed:.0f} × real time"
        line = f"{self.name}: {self.clips} clips in {self.shards_done} shards{skipped}, {self.seconds:.1f} s, {speed}"
        if self.rejected:
            common = "; ".join(f"{count} × {reason}" for reason, count in self.reasons.most_common(3))
            line += f"; {self.rejected} rejected: {common}" + (" …" if len(self.reasons) > 3 else "")
        if self.left_out:
            line += f"; {self.left_out.total()} left out: " + "; ".join(f"{count} × {kind}" for kind, count in self.left_out.items())
        counts = self.counts()
        return f"{line}\n{counts.pop('in')} clips in = " + " + ".join(f"{count} {verdict}" for verdict, count in counts.items())

    def require_whole(self) -> None:
        """Raise UserError when shards are left that could not be made."""
        if not self.failing:
            return
        failures = [failure for _, result in sorted(self.failing.items()) for failure in result.failures]
        stopped = f"; {self.shards_left} more shards were not tried, since too many failed" if self.shards_left else ""
        raise UserError(
            f"the {self.name} pass is not complete: {self.failed} clips in {self.shards_failed} shards failed{stopped}. "
            f"{some(failures)}. None of them is rejected: see to the storage, and repeat the command, which makes exactly the missing "
            f"shards; `loa preprocess {self.name}` with --reject-failed gives up clips that fail"
        )


class Progress:
    """A bar on stderr and metrics in MLflow, told of every shard."""

    def __init__(self, report: PassReport, units: Sequence[Unit], bar: bool, tracker: Callable[[], Tracker]) -> None:
        self.report, self.units = report, units
        self._open, self.tracker = tracker, Tracker.off()
        patience = 0.5 if sys.stderr.isatty() else 30.0  # seconds between lines
        quiet = not bar or not units
        self._bar: Any = tqdm(
            total=sum(unit.clips for unit in units), desc=report.name, unit="clip", disable=quiet, mininterval=patience, smoothing=0.05
        )
        self._began = time.monotonic()
        self._first = True

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.report.seconds = time.monotonic() - self._began
        self._bar.close()

    def add(self, result: ShardResult) -> None:
        """Show what became of an attempt at a shard."""
        if self._first:
            self._first, self.tracker = False, self._open()
        report = self.report
        report.add(result)
        if not result.failures:
            self._bar.update(result.clips)
        elapsed = report.seconds = time.monotonic() - self._began
        rate = report.given / elapsed
        left = sum(unit.clips for unit in self.units) - report.given
        status = f"{report.shards_done}/{len(self.units)} shards, {report.audio_seconds / elapsed:.0f} × real time"
        status += f", {report.rejected} rejected" + (f", {report.failed} failed" if report.failing else "")
        self._bar.set_postfix_str(status, refresh=False)
        numbers = {
            "shards": report.shards_done,
            "clips_per_second": rate,
            "times_real_time": report.audio_seconds / elapsed,
            "hours_left": left / rate / 3600 if rate else float("nan"),
            "rejected": report.rejected,
            "failed": report.failed,
        }
        self.tracker.metrics({f"{report.name}/{name}": value for name, value in numbers.items()}, report.shards_done)

    def wait(self, seconds: float) -> None:
        """Say that something failed, and wait."""
        failures = [failure for result in self.report.failing.values() for failure in result.failures]
        log.warning("%d shards could not be made (%s); trying again in %g s", self.report.shards_failed, some(failures), seconds)
        time.sleep(seconds)


def histogram(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """How many values lie in each bin of EDGES[name]."""
    edges = EDGES[name]
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def gist(reason: str) -> str:
    """A reason without the recording it is about, for counting."""
    return " ".join(word for word in reason.split() if "/" not in word and not any(c.isdigit() for c in word))
