"""Ctrl-C and SIGTERM to real processes: one sentence, the status that shells give, no stack, no process left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from tiny_store import make_store, small

from friendly import STOPPED
from pipelines.features.store import CLIP_SCHEMA, REJECTED_SCHEMA, FeatureStore

REPO = Path(__file__).resolve().parent.parent
WAYS = [(signal.SIGINT, "leader"), (signal.SIGINT, "group"), (signal.SIGTERM, "leader"), (signal.SIGTERM, "group")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder whose mel pass is done, and beside it `long`: 4000 clips that no pass has seen."""
    work = tmp_path_factory.mktemp("project")
    store = make_store(work, small())
    rows = [row for shard in range(store.num_shards) for row in store.shard_rows(shard)]
    many = [{k: rows[i % len(rows)][k] for k in CLIP_SCHEMA.names} | {"clip_id": f"made-{i:05d}"} for i in range(4000)]
    table, none = pa.Table.from_pylist(many, CLIP_SCHEMA), pa.Table.from_pylist([], REJECTED_SCHEMA)
    FeatureStore.create(str(work / "long" / "store"), store.audio, table, none, seed=0, shard_size=32)
    return work


def stopped(command: list[str], under_way: Callable[[], bool], number: int, scope: str, log: Path) -> tuple[int, str]:
    """Start a job, send it the signal once it is under way; its status and all it said. `group` is what a terminal does."""

    def as_in_a_terminal() -> None:  # background jobs of shells, such as a CI's, ignore SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)

    env = os.environ | {"PYTHONPATH": str(REPO)}
    with log.open("wb") as said:
        start = {"cwd": REPO, "env": env, "start_new_session": True, "preexec_fn": as_in_a_terminal}
        job = subprocess.Popen([sys.executable, "-m", *command], stdout=said, stderr=said, **start)
    try:
        deadline = time.monotonic() + 300
        while not under_way():
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)
        children = psutil.Process(job.pid).children(recursive=True)
        (os.killpg if scope == "group" else os.kill)(job.pid, number)
        status = job.wait(120)
    finally:
        if job.poll() is None:  # what went wrong leaves nothing behind
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    psutil.wait_procs(children, 30)
    left = [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not left, left
    return status, log.read_text()


def assert_plain(said: str) -> None:
    """Progress, then the sentence; nothing after it and no stack anywhere."""
    assert said.rstrip().endswith(STOPPED), said[-2000:]
    for noise in ("Traceback", "ERROR", "core_worker", "Exception"):
        assert noise not in said, said[-2000:]


def test_training_on_ray_is_stopped_with_a_sentence(project: Path, tmp_path: Path, rounds: Callable[..., Any]) -> None:
    """As a terminal's Ctrl-C and as `kill`; `make soak`: the other two ways as well."""
    sets = ("recipes.audiomae.steps=100000", "recipes.audiomae.max_seconds=null", "recipes.audiomae.global_batch=4")
    for number, scope in rounds(WAYS[1:3], WAYS):
        work = tmp_path / f"{number}-{scope}"
        command = ["pipelines.train", "audiomae", "--tiny", "--store", str(project / "store"), "--work", str(work)]
        command += [word for setting in sets for word in ("--set", setting)]
        progress = work / "runs" / "audiomae" / "progress.json"
        status, said = stopped(command, progress.is_file, number, scope, tmp_path / f"{number}-{scope}.log")
        assert status == 128 + number, said[-2000:]
        assert_plain(said)
        assert not (work / "stages").exists()


@pytest.mark.parametrize(("number", "scope"), WAYS[1:3])
def test_passes_are_stopped_with_a_sentence(project: Path, tmp_path: Path, number: int, scope: str) -> None:
    store = project / "long" / "store"
    known = len(list(store.glob("mel/*.tar")))
    command = ["pipelines.preprocess", "mel", "--tiny", "--store", str(store)]
    status, said = stopped(command, lambda: len(list(store.glob("mel/*.tar"))) > known, number, scope, tmp_path / "log")
    assert status == 128 + number
    assert_plain(said)
    assert FeatureStore.open(store).missing_shards("mel")
