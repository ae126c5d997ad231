"""Checkpoints are written while training goes on, whole or not at all, on a disk and on an object store."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from children import start, train
from tiny_store import largest_difference, make_store, small
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

from pipelines.train import train_stage
from pipelines.training import loop
from pipelines.training.checkpoint import COMMIT, Checkpoints, TrainingState
from stages.base import read_card
from stages.errors import UserError
from stages.files import Place
from stages.variants import Variant

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Variant]:
    """A project folder with a store, and the variant that it was made for."""
    make_store(work := tmp_path_factory.mktemp("checkpoints"), variant := small())
    return work, variant


def of(variant: Variant, steps: int, **settings: Any) -> Variant:
    """AudioMAE for so many steps, with an average of its weights."""
    recipe = replace(variant.recipes.audiomae, steps=steps, validate_every=100, decay="constant", ema_decay=0.5, **settings)
    return replace(variant, recipes=replace(variant.recipes, audiomae=recipe))


@pytest.fixture
def short(line: tuple[Path, Variant]) -> Callable[..., Place]:
    def run(work: Path | str, steps: int, every: int = 1, **options: Any) -> Place:
        return train_stage("audiomae", of(line[1], steps, checkpoint_every=every), work, store=str(line[0] / "store"), **options)

    return lambda *args, **options: run(*args, **{"workers": 0, **options})


@pytest.fixture(scope="module")
def undisturbed(line: tuple[Path, Variant]) -> Callable[[int], Path]:
    """What a run of so many steps releases that nothing happens to."""

    @functools.cache
    def run(steps: int) -> Path:
        variant, store = of(line[1], steps, checkpoint_every=steps), str(line[0] / "store")
        return train_stage("audiomae", variant, line[0] / f"whole-{steps}", store=store, workers=0).path

    return run


def committed(run: Place) -> list[str]:
    return sorted(name.split("/")[0] for name in run.tree() if name.endswith(f"/{COMMIT}"))


# ------------------------------------------------------------------------------------------- while training goes on


def test_what_is_saved_is_the_state_of_its_step(
    short: Callable[..., Place], undisturbed: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer waits until two more steps are taken; a run that continues from what it then writes equals an undisturbed one."""
    step, write, later = loop._Run._step, Checkpoints._write, threading.Event()
    ahead = []

    def stepped(self: loop._Run, batches: Any) -> Any:
        logs = step(self, batches)
        if self.progress.step == 4:  # counted from 0: the fifth
            later.set()
        return logs

    def late(self: Checkpoints, name: str, *rest: Any) -> None:
        if name == "step_00000003":
            ahead.append(later.wait(60))
        write(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_step", stepped)
        patch.setattr(Checkpoints, "_write", late)
        short(tmp_path / "late", 6, every=3)
    assert ahead == [True]
    run = Place.of(tmp_path / "late" / "runs" / "audiomae")
    assert committed(run) == ["step_00000003", "step_00000006"]
    (run / "step_00000006").remove_tree()
    shutil.rmtree(tmp_path / "late" / "stages")
    assert largest_difference(short(tmp_path / "late", 6, every=3).path, undisturbed(6)) == 0.0


def test_one_is_written_at_a_time_and_the_last_before_the_release(
    short: Callable[..., Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, release, events = Checkpoints._write, loop.release, list[str]()

    def noted(self: Checkpoints, name: str, *rest: Any) -> None:
        events.append(f"{name} begins")
        write(self, name, *rest)
        events.append(f"{name} ends")

    def released(*args: Any) -> None:
        events.append("release")
        release(*args)

    monkeypatch.setattr(Checkpoints, "_write", noted)
    monkeypatch.setattr(loop, "release", released)
    short(tmp_path, 3)
    names = [f"step_{step:08d}" for step in (1, 2, 3)]
    assert events == [f"{name} {what}" for name in names for what in ("begins", "ends")] + ["release"]
    assert threading.active_count() == len([t for t in threading.enumerate() if not t.name.startswith("checkpoint")])


def test_what_ends_a_training_waits_for_the_checkpoint_under_way(
    short: Callable[..., Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the second is being written: it is whole in the end."""
    write, begun = Checkpoints._write, threading.Event()

    def slow(self: Checkpoints, name: str, *rest: Any) -> None:
        if name == "step_00000002":
            begun.wait(60)
        write(self, name, *rest)

    step = loop._Run._step

    def interrupted(self: loop._Run, batches: Any) -> Any:
        if self.progress.step == 2:
            threading.Timer(0.3, begun.set).start()
            raise KeyboardInterrupt
        return step(self, batches)

    monkeypatch.setattr(Checkpoints, "_write", slow)
    monkeypatch.setattr(loop._Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        short(tmp_path, 5)
    assert committed(Place.of(tmp_path / "runs" / "audiomae")) == ["step_00000001", "step_00000002"]


def die_in_mid_save(name: str, *args: Any, **kwargs: Any) -> None:
    """Train, and be killed when all files of a checkpoint are there but not its COMMIT."""
    write_json = Place.write_json

    def killed(self: Place, value: Any) -> None:
        if (self.parent.name, self.name) == (name, COMMIT):
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(self, value)

    Place.write_json = killed  # type: ignore[method-assign]
    train(*args, **kwargs)


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_kill_in_mid_save_leaves_the_one_before(
    short: Callable[..., Place],
    undisturbed: Callable[[int], Path],
    line: tuple[Path, Variant],
    tmp_path: Path,
    where: str,
    request: pytest.FixtureRequest,
) -> None:
    work = Place.of(tmp_path / "killed") if where == "disk" else Place.of(f"{request.getfixturevalue('s3')}/killed")
    options = {"store": str(line[0] / "store"), "workers": 0}
    variant = of(line[1], 5, checkpoint_every=1)
    child = start(tmp_path / "log", die_in_mid_save, "step_00000004", "audiomae", variant, work, **options)
    child.join(120)
    assert child.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    run = work / "runs" / "audiomae"
    assert committed(run) == ["step_00000002", "step_00000003"] and "step_00000004/.metadata" in run.tree()
    with pytest.warns(UserWarning, match="step_00000004 is no whole checkpoint .it has no COMMIT.; going on from one that is"):
        ended = short(str(work), 5)
    assert committed(run) == ["step_00000004", "step_00000005"]
    assert largest_difference(ended.local_copy(), undisturbed(5)) == 0.0


def test_what_lies_beyond_a_restart_goes(short: Callable[..., Place], tmp_path: Path) -> None:
    """Back from a damaged step 6 to step 4, then on in other strides: the new step 5 stays, though 6 is a greater number."""
    short(tmp_path, 6, every=2)
    run = Place.of(tmp_path / "runs" / "audiomae")
    (run / "step_00000006" / ".metadata").write(b"")
    shutil.rmtree(tmp_path / "stages")
    with pytest.warns(UserWarning, match="step_00000006 is no whole checkpoint"):
        short(tmp_path, 5, every=5)
    assert committed(run) == ["step_00000004", "step_00000005"] and "step_00000006" not in run.folders()


# ---------------------------------------------------------------------------------------------------- several workers


def save_with_a_rank_that_fails(rank: int, folder: str, failing: str) -> None:
    """One of two workers, which save twice; at the second time the other one's part fails, or the first one's COMMIT."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    part = torch.nn.Linear(3, 2)
    state = TrainingState({"part": part}, {"part": torch.optim.AdamW(part.parameters())})
    checkpoints = Checkpoints(Place.of(folder) / "run", rank)
    state.progress.step = 1
    checkpoints.save(state)
    checkpoints.wait()
    if failing == "part" and rank == 1:
        FsspecWriter.prepare_local_plan = lambda *_: 1 / 0  # type: ignore[method-assign, assignment]
    if failing == "commit":
        Place.write_json = lambda *_: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    state.progress.step = 2
    checkpoints.save(state)
    try:
        checkpoints.wait()
    except UserError as error:
        print(f"rank {rank}: {error}")
    checkpoints.close()
    dist.destroy_process_group()


@pytest.mark.parametrize("failing", ["part", "commit"])
def test_all_workers_hear_of_one_that_cannot_save(tmp_path: Path, failing: str) -> None:
    """None of them goes on waiting, nothing of the checkpoint stays, the one before does."""
    workers = [start(tmp_path / f"{rank}.log", save_with_a_rank_that_fails, rank, str(tmp_path), failing) for rank in range(2)]
    for rank, worker in enumerate(workers):
        worker.join(60)
        said = (tmp_path / f"{rank}.log").read_text()
        assert worker.exitcode == 0, said
        assert f"rank {rank}: the checkpoint step_00000002 cannot be written to" in said and "ZeroDivisionError" in said
        assert "step_00000001 is there: make room" in said
    assert set((Place.of(tmp_path) / "run").folders()) == {"step_00000001"}


# ---------------------------------------------------------------------------------------------------- on an object store


def test_a_run_on_an_object_store_goes_on_elsewhere(
    short: Callable[..., Place], undisturbed: Callable[[int], Path], s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun on a machine whose cache is lost; its newest checkpoint is a truncated object: the weights are those of an undisturbed run."""
    monkeypatch.setenv("LOA_CACHE", str(tmp_path / "cache"))
    short(f"{s3}/w", 4)
    run = Place.of(s3) / "w" / "runs" / "audiomae"
    assert committed(run) == ["step_00000003", "step_00000004"] and {"progress.json", "job.json"} <= run.list().keys()
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    (Place.of(s3) / "w" / "stages" / "audiomae" / "stage.json").remove()
    data = run / "step_00000004" / "__0_0.distcp"
    data.write(data.read()[: data.size() // 2])
    with pytest.warns(UserWarning, match="step_00000004 is no whole checkpoint .__0_0.distcp has"):
        ended = short(f"{s3}/w", 6)
    assert committed(run) == ["step_00000005", "step_00000006"] and read_card(ended, "audiomae")["clips"] == 24
    assert largest_difference(ended.local_copy(), undisturbed(6)) == 0.0


def test_an_object_store_that_goes_away_keeps_the_last_good_checkpoint(
    short: Callable[..., Place], undisturbed: Callable[[int], Path], s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.checkpoint import _fsspec_filesystem as torchs

    stream = torchs.FileSystem.create_stream

    def broken(self: Any, path: Any, mode: str) -> Any:
        if "step_00000003" in str(path):
            raise ConnectionError("the bucket does not answer")
        return stream(self, path, mode)

    monkeypatch.setattr(torchs.FileSystem, "create_stream", broken)
    told = "step_00000003 cannot be written to s3://.*does not answer.*step_00000002 is there: check it, its network"
    with pytest.raises(UserError, match=told):
        short(tmp_path, 5, runs=f"{s3}/runs")
    monkeypatch.undo()
    short(tmp_path, 5, runs=f"{s3}/runs")
    assert largest_difference(tmp_path / "stages" / "audiomae", undisturbed(5)) == 0.0


@pytest.mark.slow
def test_nodes_that_do_not_see_the_run_are_named_before_training(
    short: Callable[..., Place], tmp_path: Path, ray_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in one process's memory no node sees; what lies on this machine's disk they do."""
    from pipelines import cluster
    from pipelines.training.shared import require_shared

    told = r"memory://runs/audiomae is none: node [\d.]+ \(\w+\) does not see what .* name one with --runs"
    with pytest.raises(UserError, match=told):
        short(tmp_path, 2, runs="memory://runs", workers=1)
    assert not (tmp_path / "stages").exists() and not committed(Place.of("memory://runs/audiomae"))
    monkeypatch.setattr(cluster, "ends_with_us", lambda: False)  # as on a cluster that was joined
    require_shared(Place.of(tmp_path), cluster.Pool(1, 1, 1.0))
    assert not any(".shared." in name for name in Place.of(tmp_path).list())


@pytest.mark.slow
def test_ray_keeps_its_checkpoints_on_an_object_store(line: tuple[Path, Variant], s3: str, tmp_path: Path) -> None:
    """A command of its own, whose Ray has the store's address."""
    sets = [f"--set=recipes.audiomae.{setting}" for setting in ("steps=4", "global_batch=4", "checkpoint_every=2")]
    command = [sys.executable, "-m", "pipelines.train", "audiomae", "--tiny", "--workers", "1", "--store", str(line[0] / "store"), *sets]
    command += ["--work", str(tmp_path / "w"), "--runs", f"{s3}/runs"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert committed(Place.of(f"{s3}/runs/audiomae")) == ["step_00000002", "step_00000004"]
    assert not (tmp_path / "w" / "runs").exists()
