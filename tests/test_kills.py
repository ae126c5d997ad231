"""Trainings killed at random moments: what they release in the end is, bit for bit, what an undisturbed one releases."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from children import start_training
from tiny_store import largest_difference, make_store, small, whole_line

from options import Reservation
from pipelines.train import train_stage
from stages import STAGES
from stages.base import read_card, stage_class
from stages.variants import Variant

STEPS = 12  # with a checkpoint at every second, and at the third a critic
WAYS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT}  # and how it ends


def longer(variant: Variant, stage: str) -> Variant:
    recipe = replace(getattr(variant.recipes, stage), steps=STEPS, checkpoint_every=2, validate_every=STEPS)
    return replace(variant, recipes=replace(variant.recipes, **{stage: recipe}))


@pytest.mark.slow
def test_killed_trainings_release_what_undisturbed_ones_do(tmp_path: Path, rounds: Callable[[Any, Any], Any]) -> None:
    """SIGKILL, SIGTERM and Ctrl-C, each soon after a step that is drawn, from the start of a training to its release."""
    line, variant, stages = tmp_path / "line", small(), rounds(("audiomae", "vocoder"), STAGES)
    if rounds(False, True):
        whole_line(line, variant)
    else:
        make_store(line, variant)
    given = {stage: str(line / "stages" / stage) for stage in STAGES if (line / "stages" / stage).is_dir()}
    rng = np.random.default_rng(0)

    def start(stage: str, work: Path) -> Any:
        others = {name: given[name] for name in stage_class(stage).builds_on(variant)}
        options = {"store": str(line / "store"), "given": others, "workers": 0, "precision": "fp32"}
        return start_training(tmp_path / "log", stage, longer(variant, stage), work, **options)

    for stage in stages:
        child = start(stage, tmp_path / stage / "whole")
        child.join(300)
        assert child.exitcode == 0, (tmp_path / "log").read_text()[-2000:]
        counts, where = Counter[str](), []
        for turn in range(rounds(1, 2)):
            work = tmp_path / stage / f"{turn}"
            for number in rng.permutation(list(WAYS))[: rounds(2, 3)]:
                run = work / "runs" / stage
                before = int(reached(run).strip("+"))
                if before >= STEPS:
                    break
                # By steps, since machines differ in their seconds; before the first one a signal may come before its handler.
                aim, deadline = rng.integers(before + (number != signal.SIGKILL), STEPS), time.monotonic() + 300
                child = start(stage, work)
                while child.exitcode is None and int(reached(run).strip("+")) < aim and time.monotonic() < deadline:
                    time.sleep(0.005)
                child.join(rng.uniform(0.0, 0.5))
                if child.exitcode is None:
                    os.kill(child.pid, int(number))
                child.join(120)
                assert child.exitcode in (0, WAYS[int(number)]), (tmp_path / "log").read_text()[-2000:]
                if child.exitcode:  # it was not faster
                    counts[signal.Signals(int(number)).name] += 1
                    where.append(reached(run))
            child = start(stage, work)
            child.join(300)
            assert child.exitcode == 0, (tmp_path / "log").read_text()[-2000:]
            assert read_card(work / "stages" / stage, stage)["steps"] == STEPS
            assert largest_difference(work / "stages" / stage, tmp_path / stage / "whole" / "stages" / stage) == 0.0
        print(f"{stage}: {dict(counts)}, killed at {' '.join(where)}, difference 0.0")
        assert counts


@pytest.mark.slow
def test_a_ray_worker_that_is_killed_is_replaced(tmp_path: Path, ray_cluster: object, rounds: Callable[[Any, Any], Any]) -> None:
    """By Ray, without a word from anyone; with the threads of the undisturbed process it ends with the same bits."""
    make_store(tmp_path, variant := small())
    recipe = replace(variant.recipes.audiomae, steps=150, checkpoint_every=5, validate_every=150)
    variant = replace(variant, recipes=replace(variant.recipes, audiomae=recipe))
    options = {"store": str(tmp_path / "store"), "precision": "fp32"}
    train_stage("audiomae", variant, tmp_path / "whole", workers=0, **options)
    run, killed = tmp_path / "killed" / "runs" / "audiomae", list[str]()

    def kill() -> None:
        before = {reached(run)}
        for _ in range(rounds(1, 3)):
            while reached(run) in before or not (workers := ray_workers()):
                if over.wait(0.01):
                    return
            before = {reached(run), reached(run).strip("+")}
            workers[0].kill()
            killed.append(min(before))

    over = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        train_stage("audiomae", variant, tmp_path / "killed", workers=1, reserve=Reservation(cpus=1), **options)
    finally:
        over.set()
        killer.join()
    print(f"a worker of Ray killed at {' '.join(killed)}")
    assert len(killed) == rounds(1, 3)
    assert largest_difference(tmp_path / "killed" / "stages" / "audiomae", tmp_path / "whole" / "stages" / "audiomae") == 0.0


def ray_workers() -> list[psutil.Process]:
    """The processes below this one in which Ray Train trains."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def reached(run: Path) -> str:
    """The newest whole checkpoint of a run, and + where one was being written."""
    whole = [int(folder.name[5:]) for folder in run.glob("step_*") if (folder / "COMMIT").is_file()]
    half = [folder for folder in run.glob("step_*") if not (folder / "COMMIT").is_file()]
    return f"{max(whole, default=0)}{'+' if half else ''}"
