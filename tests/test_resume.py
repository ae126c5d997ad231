"""Runs that are stopped, damaged, continued and refused: what is released is what an undisturbed run gives, or nothing."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_store import largest_difference, make_store, small, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pipelines.features.store import FeatureStore
from pipelines.train import train_stage
from pipelines.training import loop
from pipelines.training.checkpoint import EMA, Checkpoints, full_weights
from pipelines.training.dataset import ClipDataset
from pipelines.training.workers import OneProcess
from stages.base import read_card, stage_class
from stages.errors import UserError
from stages.variants import Variant

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Variant]:
    """A project folder with a store, and the variant that it was made for."""
    make_store(work := tmp_path_factory.mktemp("resume"), variant := small())
    return work, variant


@pytest.fixture
def short(line: tuple[Path, Variant]) -> Callable[..., Path]:
    """A training of AudioMAE on the line's store, of so many steps, with a checkpoint at every one."""
    work, variant = line

    def run(folder: Path, steps: int, workers: int = 0) -> Path:
        recipe = replace(variant.recipes.audiomae, steps=steps, checkpoint_every=1, validate_every=100, decay="constant")
        chosen = replace(variant, recipes=replace(variant.recipes, audiomae=recipe))
        return train_stage("audiomae", chosen, folder, store=str(work / "store"), workers=workers).path

    return run


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs" / "audiomae").iterdir() if "step_" in path.name)


@pytest.mark.parametrize("damage", ["truncated", "garbled", "unreadable", "uncommitted"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(short: Callable[..., Path], tmp_path: Path, damage: str) -> None:
    """By its size, which COMMIT knows, by what it or its index holds, or for want of a COMMIT; the weights are those of a whole run."""
    short(tmp_path / "whole", 6)
    short(tmp_path / "hurt", 4)
    assert checkpoints(tmp_path / "hurt") == ["step_00000003", "step_00000004"]
    newest = tmp_path / "hurt" / "runs" / "audiomae" / "step_00000004"
    data = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    if damage == "truncated":
        os.truncate(data, data.stat().st_size // 2)
    elif damage == "garbled":
        data.write_bytes(b"\0" * data.stat().st_size)
    elif damage == "unreadable":
        index = newest / ".metadata"
        index.write_bytes(b"\0" * index.stat().st_size)
    else:
        (newest / "COMMIT").unlink()
    with pytest.warns(UserWarning, match="step_00000004 (is no whole checkpoint|cannot be read)"):
        short(tmp_path / "hurt", 6)
    assert checkpoints(tmp_path / "hurt") == ["step_00000005", "step_00000006"]
    assert largest_difference(tmp_path / "whole" / "stages" / "audiomae", tmp_path / "hurt" / "stages" / "audiomae") == 0.0


def test_a_full_disk_keeps_the_last_good_checkpoint(short: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third checkpoint does not fit: a limit on the size of files stands for the disk."""
    write = Checkpoints._write
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self: Checkpoints, name: str, *rest: Any) -> None:
        if name == "step_00000003":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            write(self, name, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(Checkpoints, "_write", full)
    with pytest.raises(UserError, match=r"the checkpoint step_00000003 cannot be written .* step_00000002 is there: make room"):
        short(tmp_path / "full", 5)
    assert checkpoints(tmp_path / "full") == ["step_00000001", "step_00000002"]  # and nothing half-written
    monkeypatch.undo()
    short(tmp_path / "whole", 5), short(tmp_path / "full", 5)
    assert largest_difference(tmp_path / "whole" / "stages" / "audiomae", tmp_path / "full" / "stages" / "audiomae") == 0.0


def test_changed_settings_hold_when_a_run_continues(line: tuple[Path, Variant], tmp_path: Path) -> None:
    """Those of the optimiser are this call's; an average that the run did not keep before begins with its weights."""
    work, variant = line

    def run(folder: Path, steps: int, **settings: Any) -> Path:
        recipe = replace(variant.recipes.audiomae, steps=steps, checkpoint_every=1, learning_rate=0.1, **settings)
        chosen = replace(variant, recipes=replace(variant.recipes, audiomae=recipe))
        return train_stage("audiomae", chosen, folder, store=str(work / "store"), workers=0).path

    def size(folder: Path) -> float:
        return float(sum(value.float().norm() ** 2 for value in weights(folder).values()) ** 0.5)

    run(tmp_path / "a", 1, weight_decay=0.0, warmup_steps=0, decay="constant")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    plain = size(run(tmp_path / "a", 3, weight_decay=0.0, warmup_steps=0, decay="constant"))
    assert size(run(tmp_path / "b", 3, weight_decay=9.0, warmup_steps=0, decay="constant")) < plain / 2  # 0.1 of them is left after a step
    averaged = run(tmp_path / "a", 4, weight_decay=0.0, warmup_steps=0, decay="constant", ema_decay=0.999)
    assert read_card(averaged, "audiomae")["steps"] == 4 and np.isfinite(size(averaged))
    run(tmp_path / "a", 5, weight_decay=0.0, warmup_steps=0, decay="constant")  # and back


@pytest.mark.slow
def test_this_process_and_ray_continue_each_others_runs(short: Callable[..., Path], tmp_path: Path, ray_cluster: object) -> None:
    short(tmp_path / "whole", 6)
    for steps, workers in ((2, 0), (4, 1), (6, 0)):
        short(tmp_path / "mixed", steps, workers)
        assert checkpoints(tmp_path / "mixed")[-1] == f"step_{steps:08d}"
    assert read_card(tmp_path / "mixed" / "stages" / "audiomae", "audiomae")["clips"] == 24
    # Ray's worker may have another number of threads, which sum in another order; Adam makes a share of a step (1e-3) of that.
    assert largest_difference(tmp_path / "whole" / "stages" / "audiomae", tmp_path / "mixed" / "stages" / "audiomae") < 1e-4


@pytest.mark.slow
def test_what_one_worker_cannot_read_ends_all(line: tuple[Path, Variant], tmp_path: Path, ray_cluster: object) -> None:
    """Clips of every second position are the second worker's: the first waits for it in a collective, and must not wait for ever."""
    work, variant = line
    shutil.copytree(work / "store", tmp_path / "store")
    store = FeatureStore.open(tmp_path / "store")
    clips = ClipDataset(store, stage_class("audiomae"), ["waveform"], "train")
    number = int(clips.numbers[clips.order(0).take(0, 2)[1].clip])
    span = store.ledger("waveform").find(store.table.shard_of(number), number)
    tar = Path(store.root) / "waveform" / span.object
    data = bytearray(tar.read_bytes())
    data[span.offsets[0] + span.offsets[1] // 2] ^= 1
    tar.write_bytes(data)
    began = time.monotonic()
    with pytest.raises(UserError, match="the clip made-.* of the series 'waveform' is damaged"):
        train_stage("audiomae", variant, tmp_path / "work", store=store.root, workers=2)
    assert time.monotonic() - began < 240  # it used to be for ever; most of it is Ray starting its workers twice
    assert not (tmp_path / "work" / "stages" / "audiomae").exists()


def test_gathered_averages_stay_when_the_live_weights_come_back(tmp_path: Path) -> None:
    world = OneProcess()
    try:
        part = torch.nn.Linear(3, 2)
        parts = {"part": fully_shard(part, mesh=init_device_mesh("cpu", (1,)))}
        average = EMA(parts, decay=0.5)
        before = full_weights(part)["weight"]
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(1.0)
        average.update()  # (1 + 1) / (10 + 1) of the old weights stay
        with average.swapped_in():
            gathered = full_weights(part)
        assert torch.allclose(gathered["weight"], before + 9 / 11)
        assert torch.allclose(full_weights(part)["weight"], before + 1.0)
    finally:
        world.close()


def test_gradients_that_stay_infinite_end_the_run(
    line: tuple[Path, Variant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stages.audiomae.training import AudioMAEStage

    work, variant = line
    losses = AudioMAEStage.losses

    def broken(self, batch):  # type: ignore[no-untyped-def]
        for part, loss, logs in losses(self, batch):
            yield part, loss * float("inf"), logs

    monkeypatch.setattr(AudioMAEStage, "losses", broken)
    longer = replace(variant, recipes=replace(variant.recipes, audiomae=replace(variant.recipes.audiomae, steps=50)))
    with pytest.raises(UserError, match="not finite for 20 steps"):
        train_stage("audiomae", longer, tmp_path, store=str(work / "store"), workers=0)
    assert not (tmp_path / "stages" / "audiomae").exists()
    told = [line for line in capsys.readouterr().err.splitlines() if "was not finite, so it moved nothing; its clips: made-" in line]
    assert len(told) == loop.NAMED and told[0].count("made-") == 4  # the first few batches of four


@pytest.mark.parametrize(
    ("steps", "sentence"), [(60, "'autoencoder' were not finite for 20 steps"), (3, "none of the last 3 steps moved 'autoencoder'")]
)
def test_a_critic_that_steps_hides_no_generator_that_does_not(
    line: tuple[Path, Variant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, sentence: str
) -> None:
    from stages.vae.training import VAEStage

    work, variant = line
    losses = VAEStage.losses

    def broken(self, batch):  # type: ignore[no-untyped-def]
        for part, loss, logs in losses(self, batch):
            yield part, loss * (float("inf") if part == "autoencoder" else 1.0), logs

    monkeypatch.setattr(VAEStage, "losses", broken)
    recipe = replace(variant.recipes.vae, steps=steps, validate_every=1000, checkpoint_every=1000)
    critical = replace(variant, recipes=replace(variant.recipes, vae=recipe), vae_loss=replace(variant.vae_loss, critic_start=0))
    with pytest.raises(UserError, match=sentence):
        train_stage("vae", critical, tmp_path, store=str(work / "store"), workers=0)
    assert not (tmp_path / "stages" / "vae").exists()
