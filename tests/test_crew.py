"""Workers that train one stage after another."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_store import largest_difference, make_store, small

from options import Reservation
from pipelines.train import train_stage
from pipelines.training import launch
from pipelines.training.launch import Crew
from stages.errors import UserError


def kill_the_worker(begun: Path, killed: list[int]) -> None:
    """SIGKILL to Ray Train's worker once it has a checkpoint of `begun`, and before it is done."""
    while not list(begun.glob("step_*")):
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)


@pytest.mark.slow
def test_stages_that_follow_each_other_share_their_workers(tmp_path: Path, ray_cluster: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """They start once, and again when one is killed in the second stage; weights are those of one process either way."""
    variant = small(steps=6)
    recipes = replace(variant.recipes, classifier=replace(variant.recipes.classifier, steps=200, checkpoint_every=5))
    variant = replace(variant, recipes=recipes)
    make_store(tmp_path, variant, clips=12)
    starts: list[Any] = []
    trainer = launch._trainer
    monkeypatch.setattr(launch, "_trainer", lambda *args: starts.append(args) or trainer(*args))
    store, killed, begun = str(tmp_path / "store"), [], tmp_path / "ray" / "runs" / "classifier"
    murderer = threading.Thread(target=kill_the_worker, args=(begun, killed), daemon=True)
    murderer.start()
    one_thread = Reservation(cpus=torch.get_num_threads(), gpus=0)  # as this process has: the order of sums is the same
    with Crew(1, one_thread) as crew:
        for stage in ("audiomae", "classifier"):
            train_stage(stage, variant, tmp_path / "ray", store=store, crew=crew)
        with pytest.raises(UserError, match="precision is 'half'; expected auto"):
            train_stage("vae", variant, tmp_path / "ray", store=store, crew=crew, precision="half")
        train_stage("vocoder", variant, tmp_path / "ray", store=store, crew=crew)
    assert len(starts) == 1 and len(killed) == 1
    for stage in ("audiomae", "classifier", "vocoder"):
        alone = train_stage(stage, variant, tmp_path / "alone", store=store, workers=0)
        assert largest_difference(tmp_path / "ray" / "stages" / stage, alone.path) == 0.0


@pytest.mark.slow
def test_what_a_worker_could_not_go_on_with_is_told_without_a_restart(tmp_path: Path, ray_cluster: object) -> None:
    """With two workers Ray is to start them again before they answer; it may not, and their sentence lies in the run's folder."""
    variant = small(steps=2)
    store = make_store(tmp_path, variant, clips=12)
    with Crew(2, max_failures=0) as crew, pytest.raises(UserError, match="precision is 'half'; expected auto"):
        train_stage("audiomae", variant, tmp_path, store=store.root, crew=crew, precision="half")


def test_a_finished_stage_starts_no_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = small(steps=1)
    make_store(tmp_path, variant, clips=12)
    first = train_stage("classifier", variant, tmp_path, workers=0)
    starts: list[Any] = []
    monkeypatch.setattr(launch, "_RayCrew", lambda *args: starts.append(args))
    with Crew(1) as crew:
        assert train_stage("classifier", variant, tmp_path, crew=crew) == first
    assert starts == []
