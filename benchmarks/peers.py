"""loa against a peer or the plain way, both in one run, alternating: ratios hold where clocks are noisy.

python benchmarks/peers.py            all of them, about a minute
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import webdataset

from pipelines.features.store import CLIP_SCHEMA, REJECTED_SCHEMA, FeatureStore
from stages.audio import AudioConfig
from stages.clap.model import ClapConfig, clap_mel
from stages.translator.model import TranslatorConfig, generate_loa

ROUNDS = 5


def versus(title: str, ours: Callable[[], object], peer: Callable[[], object], unit: str, count: int) -> None:
    """Print both medians over ROUNDS alternating runs, and the ratio's range."""
    ours(), peer()
    times = [(_time(ours), _time(peer)) for _ in range(ROUNDS)]
    ratios = sorted(p / o for o, p in times)
    mine, theirs = statistics.median(o for o, _ in times), statistics.median(p for _, p in times)
    print(
        f"{title:<64} loa {count / mine:>9,.0f} {unit}/s   peer {count / theirs:>9,.0f} {unit}/s   "
        f"x{statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})",
        flush=True,
    )


def _time(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def clap_front_end() -> None:
    """CLAP's spectrogram in batches, against transformers' feature extractor clip by clip (equal values)."""
    extractor = ClapConfig().feature_extractor()
    clips = np.random.default_rng(0).standard_normal((4, 480_000)).astype(np.float32) * 0.1
    batch = torch.from_numpy(clips)
    versus(
        "CLAP spectrogram, 10 s clips, vs ClapFeatureExtractor",
        lambda: clap_mel(batch, extractor),
        lambda: [extractor(clip, sampling_rate=48_000, return_tensors="np") for clip in clips],
        "clips",
        len(clips),
    )


def loa_generation() -> None:
    """Eight LOA vectors by GPT-2 base with cached keys, against running the whole prefix again for every vector."""
    model = TranslatorConfig().build(8).eval()
    states, mask = torch.randn(4, 20, 768), torch.ones(4, 20, dtype=torch.long)

    def plainly() -> torch.Tensor:
        sequence, seen = states, mask
        for _ in range(8):
            last = model.transformer(inputs_embeds=sequence, attention_mask=seen).last_hidden_state[:, -1:]
            sequence, seen = torch.cat([sequence, last], 1), torch.cat([seen, seen.new_ones(4, 1)], 1)
        return sequence[:, -8:]

    with torch.no_grad():
        difference = float((plainly() - generate_loa(model, states, mask, 8)).abs().max())
        assert difference < 1e-4, difference
        versus(
            "8 LOA vectors, GPT-2 base, batch 4, vs the whole prefix each time",
            lambda: generate_loa(model, states, mask, 8),
            plainly,
            "clips",
            4,
        )


def random_reads() -> None:
    """2,000 mels of the feature store in a shuffled order, against webdataset reading the shards in order."""
    audio = AudioConfig(clip_seconds=2.56)
    names = [f"made-{i:05d}" for i in range(2000)]
    row = {"corpus": "made", "path": "", "start": 0.0, "seconds": 2.56, "captions": [], "transcript": "", "labels": []}
    rows = [row | {"clip_id": name, "split": "train", "licence": ""} for name in names]
    with tempfile.TemporaryDirectory() as folder:
        tables = pa.Table.from_pylist(rows, CLIP_SCHEMA), pa.Table.from_pylist([], REJECTED_SCHEMA)
        store = FeatureStore.create(str(Path(folder) / "store"), audio, *tables, seed=0, shard_size=256)
        store.begin_series("mel", {"encoder": "none"})
        mel = np.zeros((256, 64), np.float16)
        for shard in range(store.num_shards):
            store.write_shard("mel", shard, [(r["clip_id"], {"mel.npy": mel}) for r in store.shard_rows(shard)], [])
        reader = store.reader(["mel"])
        order = np.random.default_rng(0).permutation(names)
        tars = sorted(str(p) for p in (Path(folder) / "store" / "mel").glob("*.tar"))
        versus(
            "2,000 mels in random order, vs webdataset in shard order",
            lambda: [reader.read(name) for name in order],
            lambda: list(webdataset.WebDataset(tars, shardshuffle=False).decode()),
            "clips",
            len(names),
        )


if __name__ == "__main__":
    for benchmark in (clap_front_end, loa_generation, random_reads):
        benchmark()
