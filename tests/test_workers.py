"""What does not depend on the number of workers, and what does: two processes on gloo beside one, without Ray."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_vae
import torch
import torch.distributed as dist
from tiny_store import make_store, small
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from pipelines.features.store import FeatureStore
from pipelines.tracking import Tracker
from pipelines.training import precision
from pipelines.training.checkpoint import TrainingState
from pipelines.training.dataset import ClipDataset
from pipelines.training.job import TrainJob
from pipelines.training.loop import _Run
from pipelines.training.workers import OneProcess, shard
from stages.base import Stage
from stages.clap.training import ClapStage
from stages.conditions import ClapDropout
from stages.config import Recipe
from stages.translator.training import TranslatorStage, build_translator
from stages.vae.model import PatchCriticConfig
from stages.vae.training import VAEStage
from stages.variants import Variant

pytestmark = pytest.mark.slow  # two processes import everything

CLIPS = 4
CPU = torch.device("cpu")


def variant_of(stage: str) -> Variant:
    variant = small()
    recipe = Recipe(1, CLIPS, 1e-3, clip_norm=None)
    return replace(variant, recipes=replace(variant.recipes, **{stage: recipe}))


def run_of(name: str, stage: Stage, store: str, rank: int, world: int) -> _Run:
    """The loop's state around a stage, sharded over the workers."""
    parts = shard(stage, init_device_mesh("cpu", (world,)))
    optimizers = {part: torch.optim.SGD(module.parameters(), lr=1e-3) for part, module in parts.items()}
    job = TrainJob(name, variant_of(name), store, "", {}, "", precision="fp32")
    workers = SimpleNamespace(rank=rank, world=world, device=CPU)
    return _Run(job, workers, stage, TrainingState(parts, optimizers), None)  # type: ignore[arg-type]


def gradients(name: str, stage: Stage, batch: dict[str, Any], rank: int, world: int) -> dict[str, torch.Tensor]:
    """Of every part, one after another without a step between, over the worker's share of the batch."""
    run = run_of(name, stage, "", rank, world)
    mine = {k: v[rank::world] for k, v in batch.items()}
    streams, weights = run._begin([mine])
    found = {}
    while (part := run._accumulate(streams, weights, {})) is not None:
        grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in run.trained[part] if p.grad is not None]
        found[part] = torch.cat([grad.flatten() for grad in grads if grad is not None])
        run._forget_gradients()
    return found


def translator(dropout: float) -> tuple[TranslatorStage, dict[str, torch.Tensor]]:
    variant = variant_of("translator")
    variant = replace(variant, translator=replace(variant.translator, dropout=dropout))
    torch.manual_seed(0)
    stage = TranslatorStage(build_translator(variant), variant.translator.loss, variant.text_length, None, ClapDropout(0.0, None))
    batch = {
        "clap": torch.randn(CLIPS, variant.clap.projection_dim),
        "text": torch.randn(CLIPS, 6, variant.t5.width),
        "text_mask": torch.ones(CLIPS, 6, dtype=torch.long),
        "loa": torch.randn(CLIPS, variant.loa_tokens(variant.translator.pooling), variant.audiomae.width),
    }
    return stage, batch


def vae(norm: str) -> tuple[VAEStage, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    critic = PatchCriticConfig(channels=8, layers=2, norm=norm)
    stage = VAEStage(test_vae.CONFIG, replace(test_vae.LOSS, critic=critic, adaptive_limit=1e-3), test_vae.AUDIO)
    made = test_vae.make_batch(stage, CLIPS)
    return stage, {k: v for k, v in made.items() if isinstance(v, torch.Tensor)}


def clap_measures(store: str, prepared: Path, rank: int, world: int) -> dict[str, float]:
    variant = variant_of("clap")
    torch.manual_seed(0)
    stage = ClapStage.build(variant, lambda name: prepared)
    run = run_of("clap", stage, store, rank, world)
    return run._validate(ClipDataset(FeatureStore.open(store), ClapStage, ["waveform"], "validation"), Tracker.off())


def measured_time(rank: int, world: int) -> dict[str, float]:
    """bf16 is faster on the first worker and slower on the second."""
    import time

    seconds = {"bf16": (0.05, 0.4)[rank], "fp32": 0.2}
    return precision.measure(lambda name: time.sleep(seconds[name]), CPU, world)


def everything(rank: int, world: int, store: str, prepared: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"clap": clap_measures(store, prepared, rank, world)}
    for label, stage, (network, batch) in (
        ("translator", "translator", translator(0.0)),
        ("translator, dropout", "translator", translator(0.5)),
        ("vae", "vae", vae("group")),
        ("vae, batch norm", "vae", vae("batch")),
    ):
        found |= {f"{label}: {part}": grad for part, grad in gradients(stage, network, batch, rank, world).items()}
    if world > 1:
        found["seconds"] = measured_time(rank, world)
    return found


def worker(rank: int, world: int, store: str, prepared: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous-{world}", rank=rank, world_size=world)
    try:
        torch.save(everything(rank, world, store, prepared), out / f"{rank}-of-{world}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process finds, and what each of two does, by "rank-of-world"."""
    out, variant = tmp_path_factory.mktemp("workers"), variant_of("clap")
    store = make_store(out, variant)
    prepared = out / "prepared"
    prepared.mkdir()
    ClapStage.prepare(variant, lambda name: out, ClipDataset(store, ClapStage, ["waveform"], "train"), prepared)
    torch.multiprocessing.spawn(worker, (2, store.root, prepared, out), nprocs=2)
    alone = OneProcess()
    try:
        one = everything(0, 1, store.root, prepared)
    finally:
        alone.close()
    return {"0-of-1": one} | {name: torch.load(out / f"{name}.pt", weights_only=True) for name in ("0-of-2", "1-of-2")}


def apart(found: dict[str, dict[str, Any]], what: str) -> float:
    """How far the gradient of two workers is from that of one, as a share of it."""
    one, two, other = (found[name][what].double() for name in ("0-of-1", "0-of-2", "1-of-2"))
    assert torch.equal(two, other)  # both have the mean
    return float((one - two).norm() / one.norm())


@pytest.mark.parametrize("what", ["translator: translator", "vae: discriminator", "vae: autoencoder"])
def test_two_workers_have_the_gradients_of_one(found: dict[str, dict[str, Any]], what: str) -> None:
    assert apart(found, what) < 1e-4


@pytest.mark.parametrize("what", ["translator, dropout: translator", "vae, batch norm: discriminator"])
def test_dropout_and_batch_norm_are_each_workers_own(found: dict[str, dict[str, Any]], what: str) -> None:
    """What the pages say of them; should it change, so must they."""
    assert apart(found, what) > 1e-2


def test_clap_is_judged_alike_by_any_number_of_workers(found: dict[str, dict[str, Any]]) -> None:
    """Retrieval among the same clips, however many workers embed them."""
    one, two, other = (found[name]["clap"] for name in ("0-of-1", "0-of-2", "1-of-2"))
    assert two == other and {"contrast", "accuracy", "t5_accuracy"} <= one.keys()
    assert two == {name: pytest.approx(value, rel=1e-4) for name, value in one.items()}, json.dumps([one, two])
    assert one["contrast"] > 0.5  # among four clips, not among two


def test_workers_agree_on_a_precision(found: dict[str, dict[str, Any]]) -> None:
    """The slowest decides: the first worker alone would choose bf16."""
    first, second = found["0-of-2"]["seconds"], found["1-of-2"]["seconds"]
    assert first == second and precision.faster(first) == "fp32"
    assert 0.4 <= first["bf16"] < 1.0 and 0.2 <= first["fp32"] < first["bf16"]
