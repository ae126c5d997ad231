"""What came of every corpus: counts that add up, and what somebody should look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.tables import aligned


@dataclass
class CorpusCounts:
    """What came of one corpus."""

    corpus: str
    root: str
    recordings: int = 0  # usable ones
    clips: int = 0
    hours: float = 0.0  # of clips
    hours_left_out: float = 0.0  # of usable recordings: windows that were not drawn, ends shorter than half a clip
    captions: int = 0  # of clips
    filtered: dict[str, int] = field(default_factory=dict)  # left out by an option, by option
    rejected: dict[str, int] = field(default_factory=dict)  # by kind of reason
    warnings: list[str] = field(default_factory=list)  # what somebody should look at

    @property
    def listed(self) -> int:
        """What the reader listed: recordings used, filtered and rejected."""
        return self.recordings + sum(self.filtered.values()) + sum(self.rejected.values())


@dataclass(frozen=True)
class IngestReport:
    """What an ingest found."""

    store: str
    corpora: tuple[CorpusCounts, ...]
    splits: dict[str, int]  # clips by split
    already: bool = False  # nothing was done: the store has these recordings
    before: int = 0  # clips that the store had

    def counts(self) -> dict[str, float]:
        """Totals by name: listed = recordings + filtered + rejected."""
        names = ("listed", "recordings", "clips", "hours", "hours_left_out", "captions")
        sums = {name: float(sum(getattr(c, name) for c in self.corpora)) for name in names}
        return sums | {name: float(sum(sum(getattr(c, name).values()) for c in self.corpora)) for name in ("filtered", "rejected")}

    def summary(self) -> str:
        """One line on what came out."""
        total = self.counts()
        done = "already ingested: " if self.already else f"added to {self.before:,} clips: " if self.before else ""
        splits = ", ".join(f"{count:,} {split}" for split, count in self.splits.items())
        left_out = f" ({total['hours_left_out']:.2f} h of the recordings are in no clip)" if total["hours_left_out"] >= 0.005 else ""
        return (
            f"{done}{total['clips']:,.0f} clips ({splits}), {total['hours']:.2f} h{left_out}; listed {total['listed']:,.0f} = "
            f"{total['recordings']:,.0f} recordings used + {total['filtered']:,.0f} filtered + {total['rejected']:,.0f} rejected"
        )

    def warnings(self) -> list[str]:
        """What somebody should look at before training on it."""
        return [f"{c.corpus} in {c.root}: {warning}" for c in self.corpora for warning in c.warnings]

    def table(self) -> str:
        """One line per corpus with its reasons of rejection, and the totals."""
        rows = [["corpus", "recordings", "clips", "hours", "captions", "filtered", "rejected"]]
        for c in self.corpora:
            numbers = (f"{c.recordings:,}", f"{c.clips:,}", f"{c.hours:,.2f}", f"{c.captions:,}")
            rows.append([c.corpus, *numbers, reasons(c.filtered), reasons(c.rejected)])
        if len(self.corpora) > 1:
            total = self.counts()
            names = ("recordings", "clips", "hours", "captions", "filtered", "rejected")
            rows.append(["total", *(f"{total[name]:,.{2 if name == 'hours' else 0}f}" for name in names)])
        return aligned(rows, remarks=1)


def reasons(counts: Mapping[str, int]) -> str:
    """Counts by reason in words, "0" when there are none."""
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items()) or "0"
