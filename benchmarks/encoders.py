"""The loa, latent and text passes of full size, against their bare encoders at their best batch; on a GPU where there is one.

Random weights, which are as fast as trained ones. The bare encoder sees its inputs ready in memory and keeps nothing; the pass
reads its input series, encodes, and writes shards, in one process with the same device and threads. Both run in turn.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from options import Reservation
from pipelines.features.passes import LatentPass, LoaPass, MelPass, Pass, TextPass
from pipelines.features.rates import made_captions, made_rows, random_weights
from pipelines.features.run import execute
from pipelines.features.store import CLIP_SCHEMA, REJECTED_SCHEMA, FeatureStore
from stages.audio import fbank
from stages.variants import Variant, resolve

GPU = torch.cuda.is_available()
SHARD, SHARDS, ROUNDS = (64, 8, 3) if GPU else (8, 4, 3)  # two cores encode a clip or two a second
BATCHES = (8, 16, 32, 64) if GPU else (1, 4, 8)
TEXTS = 8  # captions a clip: else T5 has hardly anything to do


def make_store(root: Path, variant: Variant) -> FeatureStore:
    """A store whose mel pass is done."""
    (root / "recordings").mkdir()
    made = made_rows(root / "recordings", variant.audio)
    texts = made_captions(SHARD * SHARDS * TEXTS)
    rows = [
        made[i % len(made)]
        | {"clip_id": f"clip-{i:03d}", "corpus": "made", "split": "train", "licence": ""}
        | {"captions": texts[i * TEXTS : (i + 1) * TEXTS]}
        for i in range(SHARD * SHARDS)
    ]
    tables = pa.Table.from_pylist(rows, CLIP_SCHEMA), pa.Table.from_pylist([], REJECTED_SCHEMA)
    store = FeatureStore.create(root / "store", variant.audio, *tables, shard_size=SHARD)
    execute(MelPass(store.audio), store, workers=(0, 0), progress=False)
    return store


def bare(work: Pass, store: FeatureStore) -> Callable[[int], Callable[[], Any]]:
    """For a batch size, a call of the network alone on inputs that lie ready on the device."""
    device = work.device
    if isinstance(work, TextPass):
        captions = [text for row in store.shard_rows(0) for text in row["captions"]]

        def texts(size: int) -> Callable[[], Any]:
            parts = np.array_split(np.array(captions[: size * TEXTS]), max(1, size // 2))
            return lambda: [(work.network.clap_text(part.tolist()), work.network.t5(part.tolist())) for part in parts]

        return texts
    reader = store.reader(work.reads)
    clips = [reader.read(int(number)) for number in reader.numbers[:SHARD]]
    stacked = torch.from_numpy(np.stack([clip[work.reads[0]] for clip in clips])).to(device).float()
    if isinstance(work, LoaPass):
        frames = fbank(stacked, store.audio)
        return lambda size: lambda: work.network.features(frames[:size])
    assert isinstance(work, LatentPass)
    return lambda size: lambda: work.network.encode(stacked[:size, None])


def rate(call: Callable[[], Any], clips: int, device: torch.device) -> float:
    """Clips per second of some calls."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    call(), wait()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 5 or count < 2:
        call(), wait()
        count += 1
    return clips * count / (time.perf_counter() - began)


def main() -> None:
    """Print both rates of the passes that are named, or of all, and their ratio."""
    variant, device = resolve("audioldm2-full"), torch.device("cuda" if GPU else "cpu")
    for name in sys.argv[1:] or ("loa", "latent", "text"):
        with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
            root = Path(temporary)
            store, rates = make_store(root, variant), []
            stage = {"loa": "audiomae", "latent": "vae", "text": "clap"}[name]
            folder = random_weights(stage, variant, root)
            kinds = {"loa": lambda f: LoaPass(variant.audio, f, (1, 8)), "latent": lambda f: LatentPass(variant.audio, f)}
            work = kinds.get(name, lambda f: TextPass(variant.audio, f))(folder)
            work.load(device)
            calls = bare(work, store)
            best = max(BATCHES, key=lambda size: rate(calls(size), size, device))
            for number in range(ROUNDS):
                alone = rate(calls(best), best, device)
                for series in work.series:
                    store.discard(series, range(SHARDS)) if number else None
                began = time.perf_counter()
                execute(work, store, workers=(0, 0), reserve=Reservation(cpus=None, gpus=None), progress=False)
                whole = time.perf_counter() - began
                made = sorted(path.stat().st_mtime for path in store.series_folder(work.series[0]).path.glob("*.tar"))
                rates.append(((SHARDS - 1) * SHARD / (made[-1] - made[0]), alone, whole))
            ours, theirs, _ = np.median(rates, axis=0)
            each = sorted(a / b for a, b, _ in rates)
            spread = ", ".join(f"{ratio:.2f}" for ratio in each)
            what = f"{ours:.2f} clips/s, bare {theirs:.2f} at batch {best}"
            print(f"{name}: {what}, ratio {np.median(each):.2f} ({spread}) on {device}", flush=True)


if __name__ == "__main__":
    main()
