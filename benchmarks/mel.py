"""The mel pass on Ray, against its kernels in a plain loop over the same recordings and cores.

5,760 clips of 5 s in 24 shards: decode (libsndfile), resample (soxr), STFT, FLAC and tar. The loop checks nothing, normalises
nothing and keeps no ledger. It runs in a process per core, which have imported everything before the clock starts; loa is timed
from the moment its cluster is up, with the start of its workers, and in the steady state: from the first shard of every core on.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch

from stages.audio import AudioConfig, log_mel, pad_or_cut

CLIPS, SHARDS, RECORDINGS, SECONDS, ROUNDS = 5760, 24, 480, 5.0, 2


def make_recordings(folder: Path) -> list[Path]:
    """Noise under slow envelopes at the rates that corpora have, as WAV and FLAC."""
    rng, paths = np.random.default_rng(0), []
    for i in range(RECORDINGS):
        rate = (44_100, 48_000, 22_050, 16_000)[i % 4]
        time_axis = np.arange(int(SECONDS * rate)) / rate
        sound = 0.3 * np.sin(2 * np.pi * rng.uniform(0.2, 3) * time_axis) * rng.standard_normal(len(time_axis))
        paths.append(folder / f"{i:03d}.{'wav' if i % 3 else 'flac'}")
        soundfile.write(paths[-1], sound, rate)
    return paths


def kernels(paths: list[str], target: str, audio: AudioConfig) -> None:
    """A shard of the plain loop."""
    with tarfile.open(f"{target}-mel.tar", "w") as mels, tarfile.open(f"{target}-waveform.tar", "w") as waveforms:
        for number, path in enumerate(paths):
            samples, rate = soundfile.read(path, dtype="float32")
            waveform = pad_or_cut(soxr.resample(samples, rate, audio.sample_rate, quality="HQ"), audio.clip_samples)
            mel, flac = io.BytesIO(), io.BytesIO()
            np.save(mel, log_mel(torch.from_numpy(waveform)[None], audio)[0].half().numpy())
            soundfile.write(flac, waveform, audio.sample_rate, format="FLAC", subtype="PCM_16")
            for tar, buffer in ((mels, mel), (waveforms, flac)):
                info = tarfile.TarInfo(str(number))
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)


def _begin() -> None:
    """What a worker of the pass does as well: one thread, and memory that is kept."""
    from pipelines.features.passes import _keep_freed_memory

    torch.set_num_threads(1)
    _keep_freed_memory()


def _warm(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kernels([path], f"{folder}/x", AudioConfig())


def plain(paths: list[Path], folder: Path) -> float:
    """Clips per second of the plain loop, a process per core."""
    audio, each = AudioConfig(), CLIPS // SHARDS
    shards = [[str(paths[(shard * each + i) % len(paths)]) for i in range(each)] for shard in range(SHARDS)]
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(cores, _begin) as pool:
        pool.map(_warm, [str(paths[0])] * 4 * cores, chunksize=1)
        began = time.perf_counter()
        pool.starmap(kernels, [(shard, str(folder / str(i)), audio) for i, shard in enumerate(shards)], chunksize=1)
        return CLIPS / (time.perf_counter() - began)


def loa(paths: list[Path], folder: Path) -> dict[str, Any]:
    """Rates of the pass on a Ray of its own."""
    import pyarrow as pa

    from pipelines import cluster
    from pipelines.features.passes import MelPass
    from pipelines.features.run import execute
    from pipelines.features.store import CLIP_SCHEMA, REJECTED_SCHEMA, FeatureStore

    began = time.perf_counter()
    cluster.connect()
    joined = time.perf_counter() - began
    row = {
        "corpus": "made",
        "start": 0.0,
        "seconds": SECONDS,
        "captions": [],
        "transcript": "",
        "labels": [],
        "split": "train",
        "licence": "",
    }
    rows = [row | {"clip_id": f"clip-{i:04d}", "path": str(paths[i % len(paths)])} for i in range(CLIPS)]
    tables = pa.Table.from_pylist(rows, CLIP_SCHEMA), pa.Table.from_pylist([], REJECTED_SCHEMA)
    store = FeatureStore.create(folder / "store", AudioConfig(), *tables, seed=0, shard_size=CLIPS // SHARDS)
    start, wall = time.perf_counter(), time.time()
    execute(MelPass(store.audio), store, progress=False)
    whole = time.perf_counter() - start
    made = sorted(path.stat().st_mtime for path in Path(store.root).glob("mel/*.tar"))
    assert len(made) == SHARDS
    cores = len(os.sched_getaffinity(0))
    steady = (SHARDS - cores) * (CLIPS // SHARDS) / (made[-1] - made[cores - 1])
    return {"steady": steady, "whole": CLIPS / whole, "joined": joined, "first": made[0] - wall, "seconds": whole}


def main() -> None:
    """Both in turn."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_recordings(folder)
        for number in range(ROUNDS):
            rounds = {}
            for side in ("plain", "loa"):
                target = folder / f"{side}-{number}"
                target.mkdir()
                command = [sys.executable, __file__, side, str(folder), str(target)]
                done = subprocess.run(command, env=os.environ | {"PYTHONPATH": "."}, stdout=subprocess.PIPE, text=True, check=True)
                rounds[side] = json.loads(done.stdout.splitlines()[-1])
            kernel, ours = rounds["plain"], rounds["loa"]
            print(
                f"kernels {kernel:.0f} clips/s; loa {ours['steady']:.0f} steady ({ours['steady'] / kernel:.2f}), "
                f"{ours['whole']:.0f} with the start of its workers ({ours['whole'] / kernel:.2f}); "
                f"Ray up after {ours['joined']:.1f} s, first shard {ours['first']:.1f} s later"
            )


if __name__ == "__main__":
    if len(sys.argv) == 4:
        recordings = sorted(path for path in Path(sys.argv[2]).iterdir() if path.suffix in (".wav", ".flac"))
        print(json.dumps({"plain": plain, "loa": loa}[sys.argv[1]](recordings, Path(sys.argv[3]))))
    else:
        main()
