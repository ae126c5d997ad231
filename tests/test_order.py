"""In which order a training sees its clips, and what of them it reads."""

import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny_store import make_store, run_here, small

from pipelines.features.reader import StoreReader
from pipelines.features.store import CLIP_SCHEMA, REJECTED_SCHEMA, FeatureStore
from pipelines.leases import lease
from pipelines.train import train_stage
from pipelines.training import order as orders
from pipelines.training.checkpoint import Progress
from pipelines.training.dataset import ClipDataset, Examples, Share, clip_rng, step_rng, training_batches
from pipelines.training.order import Order, Turn
from stages.audio import AudioConfig
from stages.base import Stage, stage_class
from stages.config import Recipe
from stages.errors import UserError
from stages.files import Place

SMALL = Order(np.array([0, 8, 16, 17]), seed=5)
LARGE = Order(np.append(np.arange(0, 200 * 8, 8), 1597), seed=5)  # 200 shards of 8 clips, the last one of 5


@pytest.mark.parametrize("order", [SMALL, LARGE], ids=["one-group", "four-groups"])
def test_every_clip_comes_once_an_epoch(order: Order) -> None:
    turns = order.take(0, 3 * order.length)
    for epoch in range(3):
        assert sorted(turn.clip for turn in turns if turn.epoch == epoch) == list(range(int(order.starts[-1])))
    first, second = ([turn.clip for turn in turns if turn.epoch == epoch] for epoch in (0, 1))
    assert first != second and Order(order.starts, seed=6).take(0, 40) != turns[:40]


@pytest.mark.parametrize("order", [SMALL, LARGE], ids=["one-group", "four-groups"])
def test_an_order_continues_anywhere(order: Order) -> None:
    whole, fresh = order.take(0, 2 * order.length), Order(order.starts, order.seed)
    for cursor in (1, 13, order.length - 1, order.length, order.length + 5):
        assert fresh.take(cursor, 12) == whole[cursor : cursor + 12]


def test_a_small_store_is_shuffled_whole() -> None:
    """Of one group: the permutation that NumPy makes of all clips."""
    expected = np.random.Generator(np.random.Philox(key=[5, 0])).permutation(17)
    assert [turn.clip for turn in SMALL.take(0, 17)] == expected.tolist()


def test_a_large_store_is_read_some_shards_at_a_time() -> None:
    shards = [turn.clip // 8 for turn in LARGE.take(0, LARGE.length)]
    seen: set[int] = set()
    at = 0
    while at < LARGE.length:
        epoch, group = LARGE.group_at(at)
        mine = {int(first) // 8 for first in LARGE.clips_of(epoch, group)}
        count = next((i for i in range(at, LARGE.length) if LARGE.group_at(i) != (epoch, group)), LARGE.length) - at
        assert set(shards[at : at + count]) == mine and not mine & seen and len(mine) <= orders.GROUP
        assert len(set(shards[at : at + 100])) > 30  # and mixed within
        seen, at = seen | mine, at + count
    assert len(seen) == 200
    following = LARGE.clips_of(0, 4)  # behind the last group: the first of the next epoch
    assert np.array_equal(following, LARGE.clips_of(1, 0))


def test_weights_say_how_often_a_clip_comes() -> None:
    weights = np.repeat([0.25, 1.0, 2.5], [800, 400, 397]).astype(np.float32)
    order = Order(LARGE.starts, 5, weights)
    assert order.length == 200 + 400 + round(2.5 * 397)
    epochs = [Counter(turn.clip for turn in order.take(e * order.length, order.length)) for e in range(4)]
    for turns in epochs:
        assert sum(turns[c] for c in range(800)) == 200 and max(turns[c] for c in range(800)) == 1
        assert all(turns[c] == 1 for c in range(800, 1200)) and {turns[c] for c in range(1200, 1597)} == {2, 3}
        assert sum(turns[c] for c in range(1200, 1597)) == round(2.5 * 397)
    rare = [{c for c in turns if c < 800} for turns in epochs]
    assert all(len(rare[i] & rare[j]) < 120 for i in range(4) for j in range(i))  # others in every epoch (50 by chance)
    turns = order.take(0, order.length)
    assert len(set(turns)) == order.length  # the same clip twice is two turns, with draws of their own
    assert turns[100:140] == Order(LARGE.starts, 5, weights).take(100, 40)


def test_draws_depend_on_seed_and_turn_alone() -> None:
    turn = Turn(2, 3, 0)
    assert clip_rng(1, turn).random() == clip_rng(1, turn).random()
    others = [clip_rng(seed, t).random() for seed, t in ((1, turn), (2, turn), (1, Turn(1, 3, 0)), (1, Turn(2, 4, 0)), (1, Turn(2, 3, 1)))]
    assert len(set(others)) == 5
    assert step_rng(1, 2).random() != step_rng(1, 3).random()


# ------------------------------------------------------------------------------------------------------- of a store


def store_of(root: Any, shards: int = 100, shard_size: int = 4, corpora: tuple[str, ...] = ("a", "b")) -> FeatureStore:
    """A store whose only series holds the number of the clip."""
    clips = [
        {"clip_id": f"{corpora[i % len(corpora)]}-{i:04d}", "corpus": corpora[i % len(corpora)], "path": "", "start": 0.0, "seconds": 1.0}
        | {"captions": ["a"], "transcript": "", "labels": [], "split": "train", "licence": ""}
        for i in range(shards * shard_size)
    ]
    table, rejected = pa.Table.from_pylist(clips, CLIP_SCHEMA), pa.Table.from_pylist([], REJECTED_SCHEMA)
    store = FeatureStore.create(root, AudioConfig(), table, rejected, shard_size=shard_size)
    store.begin_series("mel", {"format": 1})
    for shard in range(store.num_shards):
        rows = store.shard_rows(shard)
        store.write_shard("mel", shard, [(row["clip_id"], {"mel.npy": np.array([row["number"]], np.int32)}) for row in rows])
    store.compact("mel")
    return store


class Numbers(Stage):
    """A stage whose example is the number of its clip."""

    series, name = ("mel",), "numbers"

    def example(self, clip, rng):
        import torch

        return {"number": torch.from_numpy(clip["mel"])}


RECIPE = Recipe(steps=10, global_batch=8, learning_rate=1.0)


def numbers_read(store: FeatureStore, world: int, progress: Progress, **settings: Any) -> list[list[int]]:
    """The clips of every step, sorted, over all workers."""
    clips = ClipDataset(store, Numbers, ["mel"], "train", **settings)
    shares = []
    for rank in range(world):
        batches = training_batches(Examples(clips, Numbers(), 3), clips.order(3), RECIPE, Share(rank, world), progress)
        shares.append([[int(n) for batch in step for n in batch["number"].flatten()] for step in batches])
    return [sorted(sum(parts, [])) for parts in zip(*shares, strict=True)]


def test_any_number_of_workers_sees_the_same_steps(tmp_path: Path) -> None:
    """Over more shards than a group holds, and from the middle."""
    store = store_of(tmp_path)
    assert store.num_shards > orders.GROUP
    one = numbers_read(store, 1, Progress())
    assert one == numbers_read(store, 4, Progress()) and len(one) == 10
    assert one[6:] == numbers_read(store, 2, Progress(step=6, cursor=48))


def test_corpora_are_weighted(tmp_path: Path) -> None:
    store = store_of(tmp_path, shards=5)
    clips = ClipDataset(store, Numbers, ["mel"], "train", turns={"a": 3, "b": 0.5})
    order = clips.order(0)
    ids = Counter(clips.clip(turn.clip)["clip_id"][0] for turn in order.take(0, order.length))
    assert ids == {"a": 30, "b": 5}
    alone = ClipDataset(store, Numbers, ["mel"], "train", turns={"a": 0})
    assert len(alone) == 10 and all(alone.clip(i)["clip_id"].startswith("b") for i in range(10))


def test_shards_of_a_remote_store_are_fetched_ahead(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Group by group, whole; read from the local disk, and gone when their turn is over. What is not there is read by ranges."""
    monkeypatch.setenv("LOA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(orders, "GROUP", 3)
    store = store_of(f"{s3}/store", shards=9)
    clips = ClipDataset(store, Numbers, ["mel"], "train")
    order = clips.order(0)
    fetched: list[set[int]] = []

    def shards(epoch: int, *groups: int) -> list[int]:
        return [int(clips.numbers[i]) // 4 for group in groups for i in order.clips_of(epoch, group)]

    def at_once(_: Order, epoch: int, group: int) -> None:
        clips.reader.fetch(shards(epoch, group, group + 1))
        fetched.append({int(path.name[:6]) for path in (tmp_path / "cache").rglob("*.tar")})

    clips.fetch_ahead = at_once  # type: ignore[method-assign]
    ranges = []
    monkeypatch.setattr(Place, "read_range", lambda self, first, end: ranges.append(self.name) or Place.of(self).read()[first:end])
    batches = training_batches(Examples(clips, Numbers(), 0), order, replace(RECIPE, steps=4), Share(0, 1), Progress())
    numbers = [int(n) for step in batches for batch in step for n in batch["number"].flatten()]
    assert numbers == [int(clips.numbers[turn.clip]) for turn in order.take(0, 32)]
    assert ranges == [] and fetched == [set(shards(0, group, group + 1)) for group in range(3)]
    next((tmp_path / "cache").rglob("*.tar")).parent.parent.rename(tmp_path / "gone")
    again = ClipDataset(store, Numbers, ["mel"], "train")
    assert [int(again.clip(i)["mel"][0]) for i in range(36)] == clips.numbers.tolist() and len(ranges) == 36


def test_workers_of_a_machine_fetch_a_shard_once(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leave what another training has brought."""
    monkeypatch.setenv("LOA_CACHE", str(tmp_path / "cache"))
    store = store_of(f"{s3}/store", shards=4)
    readers = [store.reader(["mel"]) for _ in range(3)]
    together, downloaded, download = threading.Barrier(3), [], Place.download

    def counted(self: Place, target: Path) -> None:
        downloaded.append(self.name)
        time.sleep(0.05)
        download(self, target)

    def fetch(reader: StoreReader) -> None:
        together.wait()
        reader.fetch([0, 1, 2])

    monkeypatch.setattr(Place, "download", counted)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(fetch, readers))
    assert len(downloaded) == len(set(downloaded)) == 3 and not list((tmp_path / "cache").rglob("*.fetching"))
    readers[0].fetch([3])
    store.reader(["mel"]).fetch([3])  # has brought nothing before, so it removes nothing
    assert {path.name[:6] for path in (tmp_path / "cache").rglob("*.tar")} == {"000003"}

    dead = next((tmp_path / "cache").rglob("000003*.tar")).with_suffix(".fetching")
    dead.with_suffix(".tar").unlink()
    dead.touch()
    readers[1].fetch([3])
    assert not dead.with_suffix(".tar").exists()  # somebody seems to be at it
    os.utime(dead, (0, 0))
    readers[1].fetch([3]), readers[1].fetch([3])
    assert dead.with_suffix(".tar").exists() and not dead.exists()


def test_nothing_is_fetched_onto_a_full_disk(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOA_CACHE", str(tmp_path / "cache"))
    store = store_of(f"{s3}/store", shards=2)
    reader: StoreReader = store.reader(["mel"])
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 29}))
    reader.fetch([0, 1])
    assert reader.remote and list((tmp_path / "cache").rglob("*.tar")) == [] and int(reader.read(5)["mel"][0]) == 5


# --------------------------------------------------------------------------------------------- λ before reading


def test_a_diffusion_step_reads_its_own_pooling_alone(folders_of_a_line: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, variant = folders_of_a_line, small(steps=12, batch=4)
    store, cls = FeatureStore.open(work / "store"), stage_class("diffusion")
    assert set(cls.reads(variant)) == {"latent", "text", *(f"loa-{p}" for p in variant.diffusion.poolings)}
    prepared = work / "prepared"
    prepared.mkdir(exist_ok=True)
    clips = ClipDataset(store, cls, cls.reads(variant), "train")

    def folder(name: str) -> Path:
        return prepared if name == "prepared" else work / "stages" / name

    cls.prepare(variant, folder, clips, prepared)
    stage, read, fetch = cls.build(variant, folder), [], StoreReader._fetch
    monkeypatch.setattr(StoreReader, "_fetch", lambda self, series, *rest: read.append(series) or fetch(self, series, *rest))
    batches = training_batches(Examples(clips, stage, 0), clips.order(0), variant.recipes.diffusion, Share(0, 1), Progress())
    drawn = []
    for step, (batch,) in enumerate(batches):
        pooling = int(step_rng(0, step).choice(variant.diffusion.poolings))
        assert {name for name in read if name.startswith("loa-")} == {f"loa-{pooling}"}
        assert batch["loa"].shape[1] == variant.loa_tokens(pooling)
        read.clear()
        loss = next(stage.losses(batch | {"step": step, "step_rng": step_rng(0, step)}))[1]
        assert bool(loss.isfinite())
        drawn.append(pooling)
    assert len(set(drawn)) > 1
    assert stage.reads_now(None) == ("latent", f"loa-{variant.translator.pooling}", "text")


@pytest.fixture(scope="module")
def folders_of_a_line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all features, and the stages that made them."""
    work, variant = tmp_path_factory.mktemp("order"), small()
    store = make_store(work, variant)
    for stage, passes in {"clap": ["text"], "audiomae": ["loa"], "vae": ["latent"], "vocoder": []}.items():
        folder = train_stage(stage, variant, work, workers=0)
        for name in passes:
            run_here(name, store, variant, {stage: folder})
    return work


# ------------------------------------------------------------------------------------------ runs and their stores


def test_a_run_on_a_grown_store_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variant = small(steps=2)

    def longer(steps: int) -> Any:
        return replace(variant, recipes=replace(variant.recipes, vae=replace(variant.recipes.vae, steps=steps)))

    make_store(tmp_path, variant, clips=12)
    train_stage("vae", variant, tmp_path, workers=0)
    store = FeatureStore.open(tmp_path / "store")
    row = {**store.shard_rows(0)[0], "clip_id": "made-new"}
    new = pa.Table.from_pylist([{name: row[name] for name in CLIP_SCHEMA.names}], CLIP_SCHEMA)
    store = FeatureStore.create(store.root, store.audio, new, pa.Table.from_pylist([], REJECTED_SCHEMA), shard_size=8)
    run_here_missing(store, variant)
    train_stage("vae", variant, tmp_path, workers=0)  # finished: nothing continues
    with pytest.raises(UserError, match="clips were added to .* --accept-store"):
        train_stage("vae", longer(4), tmp_path, workers=0)
    train_stage("vae", longer(4), tmp_path, workers=0, accept_store=True)
    assert "continues on the store as it is now" in capsys.readouterr().err
    train_stage("vae", longer(6), tmp_path, workers=0)  # accepted once


def run_here_missing(store: FeatureStore, variant: Any) -> None:
    from pipelines.features.shard_work import Unit, make_shard
    from pipelines.preprocess import build_pass

    work = build_pass("mel", variant)
    for shard in store.missing_shards("mel"):
        make_shard(store, work, Unit(shard, tuple(work.series), store.shard_count(shard)), work.encode)


def test_two_trainings_of_a_stage_are_refused(tmp_path: Path) -> None:
    variant = small()
    make_store(tmp_path, variant, clips=12)
    with lease(Place.of(tmp_path / "runs" / ".vae.lease"), "the run"):
        with pytest.raises(UserError, match="the run of vae in .* is in use by process"):
            train_stage("vae", variant, tmp_path, workers=0, fresh=True)
        train_stage("audiomae", small(steps=1), tmp_path, workers=0)  # another stage is nobody's
    assert not (tmp_path / "runs" / ".vae.lease").exists()


def test_weights_of_corpora_are_checked(tmp_path: Path) -> None:
    make_store(tmp_path, small(), clips=12)
    with pytest.raises(UserError, match="no clips of 'mada', but of made"):
        train_stage("vae", small(), tmp_path, workers=0, turns={"mada": 2})
    for weight in (-1.0, 1000.0, float("nan")):
        with pytest.raises(UserError, match="from 0 .never. to 100"):
            train_stage("vae", small(), tmp_path, workers=0, turns={"made": weight})
    with pytest.raises(UserError, match="vae needs"):
        train_stage("vae", small(), tmp_path, workers=0, turns={"made": 0})
