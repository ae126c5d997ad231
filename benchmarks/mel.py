"""The mel pass against its kernels: shards made by loa, and a plain loop of decode, resample, STFT, FLAC and tar.

python benchmarks/mel.py FOLDER       recordings of any kind; CPU time, so a busy machine does not matter much
"""

from __future__ import annotations

import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile
import soxr
import torch

from pipelines.features.passes import MelPass
from pipelines.features.run import ShardWorker
from pipelines.features.shard_work import Unit
from pipelines.features.store import CLIP_SCHEMA, REJECTED_SCHEMA, FeatureStore
from stages.audio import AudioConfig, log_mel, pad_or_cut

CLIPS, ROUNDS = 32, 3


def kernels(paths: list[Path], audio: AudioConfig, target: Path) -> None:
    """The same work with nothing around it: no verdicts, no normalising, no checksums, no ledger."""
    with tarfile.open(target / "mel.tar", "w") as mels, tarfile.open(target / "waveform.tar", "w") as waveforms:
        for number, path in enumerate(paths):
            with soundfile.SoundFile(path) as file:
                samples = file.read(round(audio.clip_seconds * file.samplerate), dtype="float32", always_2d=True)[:, 0]
                rate = file.samplerate
            waveform = pad_or_cut(soxr.resample(samples, rate, audio.sample_rate, quality="HQ"), audio.clip_samples)
            mel, flac = io.BytesIO(), io.BytesIO()
            np.save(mel, log_mel(torch.from_numpy(waveform)[None], audio)[0].half().numpy())
            soundfile.write(flac, waveform, audio.sample_rate, format="FLAC", subtype="PCM_16")
            for tar, buffer in ((mels, mel), (waveforms, flac)):
                info = tarfile.TarInfo(str(number))
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of all threads of this process."""
    began = time.process_time()
    call()
    return time.process_time() - began


def main(folder: Path) -> None:
    """Print clips per CPU second of both, and the ratio of each pair of runs."""
    torch.set_num_threads(1)
    audio = AudioConfig()
    suffixes = {".wav", ".flac", ".ogg", ".mp3", ".opus"}
    paths = sorted(path for path in folder.rglob("*") if path.suffix in suffixes)[:CLIPS]
    if not paths:
        raise SystemExit(f"{folder} holds no recordings")
    row = {"corpus": "made", "start": 0.0, "captions": [], "transcript": "", "labels": [], "split": "train", "licence": ""}
    rows = [
        row | {"clip_id": f"clip-{i}", "path": str(path), "seconds": min(audio.clip_seconds, soundfile.info(path).duration)}
        for i, path in enumerate(paths)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        tables = pa.Table.from_pylist(rows, CLIP_SCHEMA), pa.Table.from_pylist([], REJECTED_SCHEMA)
        store = FeatureStore.create(Path(temporary) / "store", audio, *tables, seed=0, shard_size=CLIPS)
        work = MelPass(audio)
        for series in work.series:
            store.begin_series(series, work.recipe(series))
        work.load(torch.device("cpu"))
        worker, unit = ShardWorker(store, work), Unit(0, work.series, len(paths))
        calls = [lambda: worker.make(unit), lambda: kernels(paths, audio, Path(temporary))]
        for call in calls:
            call()
        times = [[cpu_seconds(call) for call in calls] for _ in range(ROUNDS)]
    ratios = sorted(plain / ours for ours, plain in times)
    ours, plain = (len(paths) / statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"{len(paths)} clips: loa {ours:.1f} clips per CPU second, kernels {plain:.1f}, "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
