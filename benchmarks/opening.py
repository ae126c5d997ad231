"""Opening a store of ten million clips: the table, the index of two series, and the training clips of a stage.

Everything is made synthetically in a temporary folder, some 4 GB: the clip table, the indexes, and as many hard links to
one empty tar as there would be shards. Says how long opening takes a fresh process, and what memory it needs.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

CLIPS, SHARD, SERIES = 10_000_000, 256, ("mel", "waveform")
TEXT = "A dog barks twice while a car passes on a wet road"


def rows(first: int, end: int) -> pa.Table:
    """Clips that look like AudioSet's and WavCaps', in the columns of CLIP_SCHEMA."""
    from pipelines.features.table import CLIP_SCHEMA

    numbers = np.arange(first, end)
    count = len(numbers)
    ids = pa.array([f"audioset-{n:011d}" for n in numbers])
    lists = pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32), pa.array([TEXT]).take(pa.array(np.zeros(count, np.int64))))
    columns = {
        "clip_id": ids,
        "corpus": pa.array(np.where(numbers % 3, "audioset", "wavcaps").tolist()),
        "path": pa.array([f"/data/audioset/train_wav/Y{n:011d}.wav" for n in numbers]),
        "start": pa.array(np.zeros(count)),
        "seconds": pa.array(np.full(count, 10.0)),
        "captions": lists,
        "transcript": pa.array([""] * count),
        "labels": lists,
        "split": pa.array(np.where(numbers % 50, "train", "validation").tolist()),
        "licence": pa.array(["CC BY 4.0"] * count),
        "origin": pa.array([f"youtube:{n:011d}" for n in numbers]),
        "content": pa.array([""] * count),
        "recording": ids,
    }
    return pa.Table.from_pydict(columns, CLIP_SCHEMA)


def make_table(root: Path) -> int:
    """The clip table and what else makes a store; returns how many shards it has."""
    from pipelines.features.ledger import SHARDS_PER_FILE
    from pipelines.features.table import Part, write_file
    from stages.audio import AudioConfig
    from stages.files import Place

    place, per_file = Place.of(root), SHARD * SHARDS_PER_FILE
    files = [write_file(place, rows(n, min(n + per_file, CLIPS)), n // SHARD, SHARD) for n in range(0, CLIPS, per_file)]
    part = Part(0, 0, CLIPS, 0, -(-CLIPS // SHARD), tuple(files), "", "")
    (place / "parts/000000.json").write(part.to_json())
    (place / "store.json").write_json({"format": 2, "audio": AudioConfig().to_dict(), "seed": 0, "shard_size": SHARD})
    return part.shards


def make(root: Path) -> None:
    """The store."""
    from pipelines.features.ledger import SHARDS_PER_FILE
    from stages.files import write_json

    shards = make_table(root)
    for series in SERIES:
        write_json(root / series / "series.json", {})
        for group in range(0, shards, SHARDS_PER_FILE):
            index(root / series, group, min(group + SHARDS_PER_FILE, shards))


def index(folder: Path, first: int, end: int) -> None:
    """The index of the shards `first` … `end` - 1, and their objects."""
    from pipelines.features.ledger import INDEX, ROW_SCHEMA, SHARDS_PER_FILE

    shards = np.arange(first, end, dtype=np.int32)
    names = [f"{shard:06d}-0123456789ab.tar" for shard in shards]
    clips = np.arange(first * SHARD, min(end * SHARD, CLIPS), dtype=np.uint32)
    starts = np.minimum(np.arange(len(shards) + 1) * SHARD, len(clips)).astype(np.int32)
    member = pa.array([f"{folder.name}.npy"]).take(pa.array(np.zeros(len(shards), np.int64)))
    spans = np.stack([clips.astype(np.int64) % SHARD * 132_000 + 512, np.full(len(clips), 131_200)], 1).ravel()
    empty = pa.array([[]] * len(shards), ROW_SCHEMA.field("rejected").type)
    columns = [
        pa.array(shards),
        pa.array(names),
        pa.array(np.zeros(len(shards), np.int64)),
        pa.array(["0" * 64] * len(shards)),
        pa.ListArray.from_arrays(np.arange(len(shards) + 1, dtype=np.int32), member),
        pa.ListArray.from_arrays(starts, pa.array(clips)),
        pa.ListArray.from_arrays(starts * 2, pa.array(spans)),
        pa.ListArray.from_arrays(starts, pa.array(clips)),
        empty,
    ]
    (folder / INDEX).mkdir(exist_ok=True)
    with pa.ipc.new_file(folder / INDEX / f"{first // SHARDS_PER_FILE:06d}.000001.arrow", ROW_SCHEMA) as file:
        file.write_table(pa.Table.from_arrays(columns, schema=ROW_SCHEMA))
    (folder / "empty").touch()
    for name in names:
        os.link(folder / "empty", folder / name)


def opening(root: str) -> dict[str, float]:
    """Open it as a training worker does, and find some clips."""
    from pipelines.features.store import FeatureStore
    from pipelines.features.table import TEXTS
    from pipelines.training.dataset import ClipDataset
    from stages.base import stage_class

    stage = stage_class("clap")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began, worked = time.perf_counter(), time.process_time()
    store = FeatureStore.open(root)
    clips = ClipDataset(store, stage, SERIES, "train", ("audioset",))
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    drawn = np.random.default_rng(0).choice(clips.numbers, 2000).tolist()
    began = time.perf_counter()
    for clip in drawn:
        store.table.row(clip, ("clip_id", *TEXTS))
        for ledger in clips.reader.ledgers.values():
            ledger.find(store.table.shard_of(clip), clip)
    find = (time.perf_counter() - began) / len(drawn)
    return {"clips": len(clips), "seconds": seconds, "cpu": cpu, "imports_mb": before, "peak_mb": peak, "find_us": find * 1e6}


def report(found: dict[str, float]) -> None:
    """The figures, in words."""
    print(f"{CLIPS:,} clips, {len(SERIES)} series: opened in {found['seconds']:.2f} s ({found['cpu']:.2f} s of CPU)")
    print(f"peak memory {found['peak_mb']:.0f} MB, {found['imports_mb']:.0f} MB of it Python and its libraries")
    print(f"a clip's row and places are found in {found['find_us']:.0f} µs")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(opening(sys.argv[1])))
    else:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
            fresh = [sys.executable, __file__, folder]
            report(json.loads(subprocess.run(fresh, env=os.environ | {"PYTHONPATH": "."}, stdout=subprocess.PIPE, check=True).stdout))
