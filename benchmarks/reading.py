"""Training reads in a store of ten million clips, against webdataset's own loader reading tars from end to end.

The clip table and the index are of full size; of the 39,063 shards 64 are real, with a mel spectrogram of noise per clip,
and the others hard links to them: some 6 GB in a temporary folder (TMPDIR). Both sides read in one process: loa in the order of
a training, of groups of shards, webdataset in the order of the tars.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from opening import CLIPS, SHARD, make_table

REAL, FRAMES, BINS, READ = 64, 1024, 64, 16_384  # READ: clips of a measurement, as many as the real shards hold


def make(root: Path) -> None:
    """The store, with one series."""
    from pipelines.features.ledger import INDEX, ROW_SCHEMA, SHARDS_PER_FILE, _table
    from pipelines.features.store import FeatureStore

    shards = make_table(root)
    store, rng = FeatureStore.open(root), np.random.default_rng(0)
    store.begin_series("mel", {"format": 1})
    noise = rng.standard_normal((2 * FRAMES, BINS)).astype(np.float16)
    for shard in range(REAL):
        rows = store.shard_rows(shard)
        store.write_shard("mel", shard, [(row["clip_id"], {"mel.npy": noise[row["number"] % FRAMES :][:FRAMES]}) for row in rows])
    store.compact("mel")
    real, folder = store.ledger("mel"), root / "mel"
    for first in range(0, shards, SHARDS_PER_FILE):
        listed = []
        for shard in range(first, min(first + SHARDS_PER_FILE, shards)):
            like, count = real[shard % REAL], min(SHARD, CLIPS - shard * SHARD)
            name = f"{shard:06d}{like.object[6:]}"
            clips, spans, checksums = range(shard * SHARD, shard * SHARD + count), like.spans[: 2 * count], like.checksums[:count]
            listed.append(replace(like, shard=shard, object=name, clips=tuple(clips), spans=spans, checksums=checksums))
            if shard >= REAL:
                os.link(folder / like.object, folder / name)
        with pa.ipc.new_file(folder / INDEX / f"{first // SHARDS_PER_FILE:06d}.000009.arrow", ROW_SCHEMA) as file:
            file.write_table(_table(listed))


def resident() -> float:
    """MB of memory that are this process's own; pages of mapped files, which the kernel takes back when it needs them, do not count."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


def loa(root: str, cold: bool) -> tuple[float, float, float]:
    """Clips per second in the order of a training, MB of its own, and MB at most with mapped files."""
    from pipelines.features.store import FeatureStore
    from pipelines.training.dataset import ClipDataset
    from stages.base import stage_class

    clips = ClipDataset(FeatureStore.open(root), stage_class("vae"), ["mel"], "train")
    order = clips.order(0)
    turns = order.take(0, READ + 256)
    for turn in turns[:256]:  # opens most of the group's shards
        clips.clip(turn.clip)
    if cold:
        forget()
    began = time.perf_counter()
    total = sum(float(clips.clip(turn.clip)["mel"][0, 0]) for turn in turns[256:])
    assert np.isfinite(total)
    return READ / (time.perf_counter() - began), resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def webdataset(root: str, cold: bool) -> tuple[float, float, float]:
    """The same of webdataset's loader over the real shards, in their order."""
    import webdataset as wds

    names = sorted(str(path) for path in (Path(root) / "mel").glob("*.tar"))[:REAL]
    reader = iter(wds.WebDataset(names, shardshuffle=False).decode())
    next(reader)
    if cold:
        forget()
    began, count, total = time.perf_counter(), 0, 0.0
    for sample in reader:
        total += float(sample["mel.npy"][0, 0])
        count += 1
    assert np.isfinite(total)
    return count / (time.perf_counter() - began), resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget() -> None:
    """Empty the machine's cache of files; needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def main() -> None:
    """Measure both in processes of their own, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        for cold in (False, True) if os.geteuid() == 0 else (False,):
            rates: dict[str, list[float]] = {"loa": [], "webdataset": []}
            own = peak = 0.0
            for _ in range(3):
                for side in rates:
                    command = [sys.executable, __file__, side, folder, str(int(cold))]
                    answer = subprocess.run(command, env=os.environ | {"PYTHONPATH": "."}, stdout=subprocess.PIPE, check=True).stdout
                    rate, *memory = json.loads(answer)
                    rates[side].append(rate)
                    if side == "loa":
                        own, peak = max(own, memory[0]), max(peak, memory[1])
            ours, theirs = (float(np.median(values)) for values in rates.values())
            each = ", ".join(f"{a / b:.2f}" for a, b in zip(*rates.values(), strict=True))
            print(f"{'from the disk' if cold else 'from memory'}: loa {ours:,.0f} clips/s, webdataset {theirs:,.0f}")
            print(f"  ratio {ours / theirs:.2f} ({each}); loa's memory {own:,.0f} MB, with mapped files {peak:,.0f} MB at most")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps({"loa": loa, "webdataset": webdataset}[sys.argv[1]](sys.argv[2], sys.argv[3] == "1")))
    else:
        main()
