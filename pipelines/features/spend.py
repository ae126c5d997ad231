"""What a store of so many hours takes, before any of it is spent: clips, bytes per series, hours per pass.

Sizes are arithmetic on the shapes of a variant; hours come from rates that were measured (`pipelines.features.rates`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stages.sizes import clip_bytes

if TYPE_CHECKING:
    from pipelines.features.passes import Pass
    from pipelines.features.store import FeatureStore
    from stages.variants import Variant

PAPER_HOURS = 29_510  # of the corpora of AudioLDM 2-Full (Table 1 of the paper)
PASS_OF = {"mel": "mel", "waveform": "mel", "latent": "latent", "text": "text", "speech": "speech"}  # series → pass; loa-λ: loa
_NPY, _BLOCK = 128, 512  # bytes of an npy header, and of a tar's blocks


def clip_count(hours: float, clip_seconds: float) -> int:
    """Whole clips in so many hours of sound, if no recording ends within one; short recordings make more."""
    return math.ceil(hours * 3600 / clip_seconds)


def stored(num_bytes: float, flac: bool = False) -> int:
    """Bytes that an array (or a FLAC) takes as a member of a tar: its header, then whole blocks."""
    return _BLOCK + _BLOCK * math.ceil((num_bytes + (0 if flac else _NPY)) / _BLOCK)


def loa_bytes(variant: Variant, pooling: int) -> int:
    """Bytes of one clip's LOA at pooling λ: half-precision vectors."""
    return 2 * variant.loa_tokens(pooling) * variant.audiomae.width


def series_bytes(variant: Variant, poolings: Sequence[int]) -> dict[str, int]:
    """Bytes that one clip takes in the shards of each series. FLAC is taken as half the samples' size: it depends on the sound."""
    sizes = {name: size for name, size in clip_bytes(variant).items() if not name.startswith("loa-")}
    sizes |= {f"loa-{pooling}": loa_bytes(variant, pooling) for pooling in poolings}
    return {name: stored(size, flac=name == "waveform") for name, size in sizes.items()}


def pooling_shares(variant: Variant, poolings: Sequence[int]) -> tuple[float, float]:
    """What it means to store every λ and to read the drawn one, against storing and reading λ = 1 alone.

    Returns (storage, reading): both are shares of the bytes of λ = 1, when each λ is drawn equally often.
    """
    sizes, one = [loa_bytes(variant, pooling) for pooling in poolings], loa_bytes(variant, 1)
    return sum(sizes) / one, sum(sizes) / len(sizes) / one


def pass_of(series: str) -> str:
    """The pass that makes a series."""
    return "loa" if series.startswith("loa-") else PASS_OF[series]


def hours_of(clips: int, clips_per_second: float, nodes: int = 1) -> float:
    """Hours that a pass over so many clips takes on `nodes` machines that each do so many clips per second."""
    return clips / (clips_per_second * nodes) / 3600


def size_text(num_bytes: float) -> str:
    """Bytes for people, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")


def still_to_do(work: Pass, store: FeatureStore, sizes: Mapping[str, int], rates: Mapping[str, float]) -> list[str]:
    """What a pass would do to a store, in lines. Reads the ledger and the clip table alone.

    Args:
        sizes: bytes of a clip by series, where no shard of the series says them (`series_bytes`).
        rates: clips per second of this machine by pass.
    """
    lines, shards = [], set[int]()
    for series in work.series:
        ledger = store.ledger(series)
        missing = [shard for shard in range(store.num_shards) if shard not in ledger]
        clips = sum(store.shard_count(shard) for shard in missing)
        rows = [ledger[shard] for shard in list(ledger)[:8]]
        count = sum(row.count for row in rows)
        each = sum(row.num_bytes for row in rows) / count if count else sizes[series]
        source = f"{each / 1000:,.1f} kB a clip {'in its first shards' if count else 'by its shape'}"
        lines.append(f"{series}: {len(missing)} of {store.num_shards} shards, {clips:,} clips, about {size_text(clips * each)} ({source})")
        shards.update(missing)
    clips = sum(store.shard_count(shard) for shard in shards)
    seconds = sum(row["seconds"] for shard in sorted(shards)[:8] for row in store.shard_rows(shard))
    seen = sum(store.shard_count(shard) for shard in sorted(shards)[:8])
    if seen:
        lines.append(f"{clips * seconds / seen / 3600:,.2f} hours of sound" + (", from the first 8 shards" if len(shards) > 8 else ""))
    if rate := rates.get(work.name):
        lines.append(f"expected: {hours_of(clips, rate):,.2f} h on this machine at the {rate:,.1f} clips/s it was measured at")
    else:
        lines.append("expected time unknown: `loa plan --measure` measures what this machine does")
    return lines
