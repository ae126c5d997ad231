"""What a pass or an ingest shows of itself in MLflow: counts that add up, reasons, licences, histograms, clips to hear."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch

from pipelines.features.recording import read_recording
from pipelines.features.report import EDGES, PassReport, gist, histogram
from pipelines.features.store import FeatureStore
from pipelines.tracking import Tracker, never_fatal
from stages.audio import AudioConfig, log_mel, normalise, pad_or_cut
from stages.errors import AudioError

HEARD = 10  # random clips
TITLES = {
    "seconds": "duration of clips (s)",
    "words": "words in a caption",
    "loudness": "loudness of recordings (dB of full scale)",
    "silence": "silent share of recordings",
}

Clip = tuple[str, np.ndarray, np.ndarray]  # name, samples [T], log-mel [F, M]


def log_pass(tracker: Tracker, report: PassReport, store: FeatureStore) -> None:
    """Log what a pass did. MLflow out of reach is warned of and no error."""
    reasons = [("rejected", reason, count) for reason, count in report.reasons.most_common()]
    reasons += [("filtered", kind, count) for kind, count in report.left_out.most_common()]
    reasons += [("failed", failure, 1) for result in report.failing.values() for failure in result.failures]
    log_summary(
        tracker,
        report.name,
        report.counts(),
        reasons,
        report.licences,
        report.histograms,
        lambda: random_clips(store, report.made),
        store.audio,
    )


def log_summary(
    tracker: Tracker,
    name: str,
    counts: Mapping[str, int],
    reasons: Sequence[tuple[str, str, int]],
    licences: Mapping[str, Sequence[float]],
    histograms: Mapping[str, np.ndarray],
    clips: Callable[[], Iterable[Clip]],
    audio: AudioConfig,
) -> None:
    """Log counts, reasons (verdict, reason, how many), licences (clips, seconds), histograms in the bins of EDGES, and clips."""
    from pipelines import plots  # matplotlib

    with never_fatal("the counts"):
        tracker.metrics({f"{name}/total/{verdict}": count for verdict, count in counts.items()})
    with never_fatal("the table of reasons"):
        tracker.table("reasons", ("verdict", "reason", "clips"), reasons)
    with never_fatal("the table of licences"):
        table = [(licence or "not stated", int(n), round(seconds / 3600, 4)) for licence, (n, seconds) in sorted(licences.items())]
        tracker.table("licences", ("licence", "clips", "hours"), table)
    with never_fatal("the histograms"):
        panels = {TITLES[kind]: (EDGES[kind], histograms[kind]) for kind in TITLES if kind in histograms}
        if panels:
            tracker.file("histograms.png", plots.histograms(panels).png())
    with never_fatal("clips to hear"):
        for clip_id, waveform, mel in clips():
            tracker.audio(clip_id, waveform, audio.sample_rate)
            tracker.spectrogram(clip_id, mel)


def random_clips(store: FeatureStore, shards: Sequence[int], count: int = HEARD) -> Iterable[Clip]:
    """Clips drawn at random from shards that can be heard, the same ones for the same shards."""
    lacking = {shard for series in ("mel", "waveform") for shard in store.missing_shards(series)}
    shards = sorted(set(shards) - lacking)
    if not shards:
        return
    rng = np.random.default_rng(store.seed)
    chosen = rng.choice(shards, min(count, len(shards)), replace=False).tolist()
    reader = store.reader(["mel", "waveform"], chosen)
    if reader.clip_ids:
        for clip_id in rng.choice(reader.clip_ids, min(count, len(reader.clip_ids)), replace=False).tolist():
            features = reader.read(clip_id)
            yield clip_id, features["waveform"], features["mel"]


def log_ingest(tracker: Tracker, store: FeatureStore, totals: Mapping[str, float]) -> None:
    """Log what an ingest found. MLflow out of reach is warned of and no error.

    Args:
        totals: how many recordings were "listed", used ("recordings"), "rejected" and "filtered"; they must add up.
    """
    counts = {
        "kept": int(totals["recordings"]),
        "rejected": int(totals["rejected"]),
        "filtered": int(totals.get("filtered", 0)),
        "failed": 0,
    }
    counts = {"in": int(totals.get("listed", sum(counts.values()))), **counts}
    if counts["in"] * 2 != sum(counts.values()):
        raise AssertionError(f"the counts of the ingest do not add up: {counts}")
    licences, histograms = _of_the_table(store)
    kinds = store.rejected()["reason"].map(gist).value_counts()
    log_summary(
        tracker,
        "ingest",
        counts,
        [("rejected", str(reason), int(count)) for reason, count in kinds.items()],
        licences,
        histograms,
        lambda: _recorded(store),
        store.audio,
    )


def _of_the_table(store: FeatureStore) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Clips and seconds by licence, and histograms, of all clips; a batch of rows in memory at a time."""
    licences: dict[str, list[float]] = {}
    histograms = {name: np.zeros(len(EDGES[name]) - 1, np.int64) for name in ("seconds", "words")}
    for _, table in store.table.columns(["seconds", "licence", "captions"]):
        for batch in table.to_batches():
            rows = batch.to_pydict()
            for seconds, licence in zip(rows["seconds"], rows["licence"], strict=True):
                known = licences.setdefault(licence, [0, 0.0])
                known[0] += 1
                known[1] += seconds
            histograms["seconds"] += histogram("seconds", rows["seconds"])
            histograms["words"] += histogram("words", [len(caption.split()) for captions in rows["captions"] for caption in captions])
    return licences, histograms


def _recorded(store: FeatureStore) -> Iterable[Clip]:
    """Clips drawn at random from the recordings themselves, as the mel pass will make them."""
    audio, rng = store.audio, np.random.default_rng(store.seed)
    rows = store.shard_rows(int(rng.integers(store.num_shards)))
    for number in rng.permutation(len(rows))[:HEARD].tolist():
        row = rows[number]
        with suppress(AudioError, OSError):  # for the mel pass to say
            waveform = pad_or_cut(
                normalise(read_recording(row["path"], audio.sample_rate, row["start"], row["seconds"])), audio.clip_samples
            )
            yield row["clip_id"], waveform, log_mel(torch.from_numpy(waveform)[None], audio)[0].numpy()
