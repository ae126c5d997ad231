"""A small feature store of made sounds, with random weights for the frozen stages: minutes of pipeline in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.export import export
from pipelines.features.shard_work import Unit, make_shard
from pipelines.features.store import CLIP_SCHEMA, REJECTED_SCHEMA, FeatureStore
from pipelines.preprocess import build_pass
from pipelines.train import train_stage
from stages.audio import AudioConfig, write_wav
from stages.config import Recipe
from stages.files import Place
from stages.variants import Recipes, Variant, resolve

KINDS = ("tone", "noise", "clicks")


def sound(kind: str, rng: np.random.Generator, audio: AudioConfig) -> np.ndarray:
    """A clip [T] of one of three kinds."""
    t = np.arange(audio.clip_samples) / audio.sample_rate
    if kind == "tone":
        return (0.4 * np.sin(2 * np.pi * rng.uniform(300, 900) * t)).astype(np.float32)
    if kind == "noise":
        return (0.2 * rng.standard_normal(len(t))).astype(np.float32)
    clicks = np.zeros(len(t), np.float32)
    clicks[:: int(rng.uniform(0.1, 0.3) * audio.sample_rate)] = 0.9
    return clicks


def make_store(
    root: Path,
    variant: Variant,
    clips: int = 24,
    shard_size: int = 8,
    passes: Sequence[str] = ("mel",),
    corpora: Sequence[str] = ("made",),
    **columns: Any,
) -> FeatureStore:
    """A store with `clips` clips of `corpora` in turn, whose mel pass (or `passes`) is done.

    `columns` stand in place of what the clip table says of each.
    """
    rng = np.random.default_rng(0)
    rows = []
    for i in range(clips):
        kind = KINDS[i % len(KINDS)]
        path = root / "recordings" / f"{kind}{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_wav(path, sound(kind, rng, variant.audio), variant.audio.sample_rate)
        rows.append(
            {
                "clip_id": f"made-{i:03d}",
                "corpus": corpora[i % len(corpora)],
                "path": str(path),
                "start": 0.0,
                "seconds": variant.audio.clip_seconds,
                "captions": [f"a {kind}", f"the sound of a {kind}"],
                "transcript": "one two",
                "labels": [kind],
                "split": "validation" if i >= clips - 6 else "train",
                "licence": "CC0",
                **columns,
            }
        )
    store = FeatureStore.create(
        str(root / "store"),
        variant.audio,
        pa.Table.from_pylist(rows, CLIP_SCHEMA),
        pa.Table.from_pylist([], REJECTED_SCHEMA),
        seed=0,
        shard_size=shard_size,
    )
    for name in passes:
        run_here(name, store, variant)
    return store


def run_here(name: str, store: FeatureStore, variant: Variant, released: Mapping[str, Path | Place] | None = None) -> None:
    """A pass in this process, without Ray."""
    import torch

    work = build_pass(name, variant, released)
    for series in work.series:
        store.begin_series(series, work.recipe(series))
    work.load(torch.device("cpu"))
    for shard in range(store.num_shards):
        make_shard(store, work, Unit(shard, tuple(work.series), store.shard_count(shard)), work.encode)


def whole_line(work: Path, variant: Variant) -> tuple[Path, Variant]:
    """A project folder in which every stage of the variant was trained, in this process."""
    from pipelines.train import train_stage
    from pipelines.weights import released_folders

    store = make_store(work, variant)
    for stage in ("classifier", "clap", "audiomae", "vae", "vocoder"):
        train_stage(stage, variant, work, workers=0)
    for name in ("loa", "latent", "speech" if variant.phonemes else "text"):
        run_here(name, store, variant, released_folders(work, {}))
    for stage in ("translator", "diffusion", "joint"):
        train_stage(stage, variant, work, workers=0)
    return work, variant


def small(variant: str = "audioldm2-full", steps: int = 4, batch: int = 4) -> Variant:
    """The tiny twin with a handful of steps per stage."""
    tiny = resolve(variant, tiny=True)
    recipes = Recipes(
        **{
            name: replace(
                getattr(tiny.recipes, name),
                steps=steps,
                global_batch=batch,
                warmup_steps=2,
                validate_every=steps,
                checkpoint_every=2,
                max_seconds=None,  # a schedule that follows the clock would make equal runs differ on a slow machine
            )
            for name in Recipes.__dataclass_fields__
        }
    )
    assert all(isinstance(getattr(recipes, n), Recipe) for n in Recipes.__dataclass_fields__)
    # The critics join halfway, so that both halves of the adversarial stages are seen.
    late = {k: replace(getattr(tiny, k), critic_start=steps // 2) for k in ("vae_loss", "vocoder_loss")}
    return replace(tiny, recipes=recipes, **late)


def weights(folder: Path) -> dict[str, Any]:
    """All tensors of the safetensors files below a folder, by file and name."""
    from safetensors.torch import load_file

    return {f"{p.relative_to(folder)}:{k}": v for p in sorted(folder.rglob("*.safetensors")) for k, v in load_file(p).items()}


def largest_difference(a: Path, b: Path) -> float:
    """Of two folders of weights, which hold the same names."""
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys() and one
    return max(float((one[k].float() - two[k].float()).abs().max()) for k in one)


def learned_bundle(work: Path) -> Path:
    """A bundle of the tiny sizes that has learned tones, noise and clicks for some seconds; its CLAP, AudioMAE and vocoder know nothing."""
    steps = {"clap": 1, "audiomae": 1, "vae": 8, "vocoder": 1, "translator": 30, "diffusion": 40}
    variant = small(batch=8)
    variant = replace(variant, vae_loss=replace(variant.vae_loss, critic_start=100))  # half of its time
    recipes = {name: replace(getattr(variant.recipes, name), steps=n, validate_every=n, checkpoint_every=n) for name, n in steps.items()}
    variant = replace(variant, recipes=replace(variant.recipes, **recipes))
    store = make_store(work, variant, clips=24)
    for stage, series in (("clap", "text"), ("audiomae", "loa"), ("vae", "latent")):
        run_here(series, store, variant, {stage: train_stage(stage, variant, work, workers=0, precision="fp32")})
    for stage in ("vocoder", "translator", "diffusion"):
        train_stage(stage, variant, work, workers=0, precision="fp32")
    return export(work, variant).path
