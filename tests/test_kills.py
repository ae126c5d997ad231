"""Trainings killed at random moments: what they release in the end is, bit for bit, what an undisturbed one releases."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import start_training
from tiny_store import largest_difference, make_store, small, whole_line

from stages import STAGES
from stages.base import read_card
from stages.variants import Variant

STEPS = 12  # with a checkpoint at every second, and at the third a critic
WAYS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT}  # and how it ends


def longer(variant: Variant, stage: str) -> Variant:
    recipe = replace(getattr(variant.recipes, stage), steps=STEPS, checkpoint_every=2, validate_every=STEPS)
    return replace(variant, recipes=replace(variant.recipes, **{stage: recipe}))


@pytest.mark.slow
def test_killed_trainings_release_what_undisturbed_ones_do(tmp_path: Path, rounds: Callable[[Any, Any], Any]) -> None:
    """SIGKILL, SIGTERM and Ctrl-C, each at a moment drawn over the whole length of a training, from its start to its release."""
    line, variant, stages = tmp_path / "line", small(), rounds(("audiomae", "vocoder"), STAGES)
    if rounds(False, True):
        whole_line(line, variant)
    else:
        make_store(line, variant)
    given = {stage: str(line / "stages" / stage) for stage in STAGES if (line / "stages" / stage).is_dir()}
    rng = np.random.default_rng(0)

    def start(stage: str, work: Path) -> Any:
        others = {name: folder for name, folder in given.items() if name != stage}
        options = {"store": str(line / "store"), "given": others, "workers": 0, "precision": "fp32"}
        return start_training(tmp_path / "log", stage, longer(variant, stage), work, **options)

    for stage in stages:
        began, child = time.monotonic(), start(stage, tmp_path / stage / "whole")
        child.join(300)
        assert child.exitcode == 0, (tmp_path / "log").read_text()[-2000:]
        length, counts, where = time.monotonic() - began, Counter[str](), []
        for turn in range(rounds(1, 4)):
            work = tmp_path / stage / f"{turn}"
            for number in rng.permutation(list(WAYS))[: rounds(2, 3)]:
                child = start(stage, work)
                child.join(rng.uniform(0.1, 1.0) * length)
                if child.exitcode is None:
                    os.kill(child.pid, number)
                child.join(120)
                assert child.exitcode in (0, WAYS[number]), (tmp_path / "log").read_text()[-2000:]
                if child.exitcode:  # it was not faster
                    counts[signal.Signals(number).name] += 1
                    where.append(reached(work / "runs" / stage))
            child = start(stage, work)
            child.join(300)
            assert child.exitcode == 0, (tmp_path / "log").read_text()[-2000:]
            assert read_card(work / "stages" / stage, stage)["steps"] == STEPS
            assert largest_difference(work / "stages" / stage, tmp_path / stage / "whole" / "stages" / stage) == 0.0
        print(f"{stage}: {dict(counts)}, killed at {' '.join(where)}, difference 0.0, {length:.1f} s undisturbed")
        assert counts


def reached(run: Path) -> str:
    """The newest whole checkpoint of a run, and + where one was being written."""
    whole = [int(folder.name[5:]) for folder in run.glob("step_*") if (folder / "COMMIT").is_file()]
    half = [folder for folder in run.glob("step_*") if not (folder / "COMMIT").is_file()]
    return f"{max(whole, default=0)}{'+' if half else ''}"
