"""Passes on clusters that grow from nothing and lose nodes, simulated on this machine by Ray's own autoscaler."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from fake_cluster import HEAD, REPO, FakeCluster, Watch, fake_cluster, wait_until
from tiny_store import make_store, run_here, small

from pipelines.cluster import connect
from pipelines.features.ledger import LedgerRow
from pipelines.features.passes import Features, MelPass, Outcome, Row
from pipelines.features.run import execute
from pipelines.features.store import FeatureStore
from stages.audio import AudioConfig

pytestmark = pytest.mark.slow
VARIANT = small()
TYPES = yaml.safe_load((REPO / "cluster.yaml").read_text())["available_node_types"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    """The node types of cluster.yaml, as they are asked for; none at first."""
    types = {name: kind for name, kind in TYPES.items() if name != "head"}
    with fake_cluster(types) as running:
        yield running


def series(store: FeatureStore) -> dict[tuple[str, int], tuple[LedgerRow, bytes]]:
    """Every ledger row of the mel pass and the shard that it names."""
    ledgers = {name: store.ledger(name) for name in ("mel", "waveform")}
    rows = {(name, shard): row for name, ledger in ledgers.items() for shard, row in ledger.items()}
    return {(name, shard): (row, (store.series_folder(name) / row.object).read()) for (name, shard), row in rows.items()}


def is_a(node: Mapping[str, float], kind: str) -> bool:
    return all(node.get(name, 0) == TYPES[kind]["resources"].get(name, 0) for name in ("CPU", "GPU"))


def test_mel_brings_up_cpu_nodes_from_none_and_computes_nothing_on_the_head(cluster: FakeCluster, tmp_path: Path) -> None:
    store = make_store(tmp_path, VARIANT, clips=48, passes=())
    wait_until(lambda: set(cluster.nodes()) == {HEAD}, 60, cluster.logs)
    assert is_a(cluster.nodes()[HEAD], "head")
    with Watch(cluster) as watch:
        done = cluster.run("pipelines.preprocess", "mel", "--work", str(tmp_path), "--tiny", "--workers", "1-2")
    assert done.returncode == 0, done.stderr + cluster.logs()
    assert "48 clips in 6 shards" in done.stdout and store.missing_shards("mel") == []
    assert "the mel pass: waiting for a node with 1 CPU, of type cpu_worker" in done.stderr
    assert watch.nodes("Map") and HEAD not in watch.nodes("Map"), watch.seen
    assert all(is_a(watch.resources[node], "cpu_worker") for node in set(watch.resources) - {HEAD}), watch.resources


def test_an_encoder_takes_gpu_nodes_and_nothing_else(cluster: FakeCluster, tmp_path: Path) -> None:
    from stages.audiomae.model import AudioMAE

    store = make_store(tmp_path, VARIANT, clips=16)
    AudioMAE(VARIANT.audiomae).save(tmp_path / "stages" / "audiomae")
    loa = ["pipelines.preprocess", "loa", "--work", str(tmp_path), "--tiny", "--with", f"audiomae={tmp_path / 'stages' / 'audiomae'}"]
    refused = cluster.run(*loa, "--gpu", "9")
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert "a worker of the loa pass needs 4 CPUs and 9 GPUs, and the cluster's nodes have " in refused.stderr
    assert "gpu_worker: 192 CPUs and 8 GPUs, at most 4" in refused.stderr and "`--gpu 0`" in refused.stderr
    assert "waiting for a node" not in refused.stderr and store.missing_shards("loa-1") == [0, 1]

    with Watch(cluster) as watch:
        done = cluster.run(*loa)
    gpu_nodes = {node for node, resources in watch.resources.items() if "GPU" in resources}
    assert watch.nodes("MapWorker") == gpu_nodes and len(gpu_nodes) == 1, (watch.seen, done.stderr)
    assert is_a(watch.resources[min(gpu_nodes)], "gpu_worker")
    # The simulated GPU is none that PyTorch could use, and nothing takes its place.
    if not torch.cuda.is_available():
        assert done.returncode == 1 and f"was given a GPU of node {gpu_nodes.pop()}, and PyTorch" in done.stderr, done.stderr
        assert store.missing_shards("loa-1") == [0, 1]

    with Watch(cluster) as watch:
        done = cluster.run(*loa, "--gpu", "0", "--cpu", "1", "--workers", "1")
    assert done.returncode == 0 and "16 clips in 2 shards" in done.stdout, done.stderr
    assert watch.nodes("MapWorker") and HEAD not in watch.nodes("MapWorker")


class HeldMelPass(MelPass):
    """One that stops within a shard as long as a file is there, so that a test decides what happens meanwhile."""

    def __init__(self, audio: AudioConfig, hold: Path) -> None:
        super().__init__(audio)
        self.hold = hold

    def encode(self, rows: Sequence[Row], clips: Sequence[Features]) -> list[Outcome]:
        while self.hold.exists() and int(rows[0]["clip_id"][-1]) % 2:
            time.sleep(0.1)
        return super().encode(rows, clips)


def held(root: str, hold: str) -> None:
    """The pass in a process of its own."""
    store = FeatureStore.open(root)
    connect()
    execute(HeldMelPass(store.audio, Path(hold)), store, progress=False)


def test_four_nodes_one_lost_and_one_added_write_the_bytes_of_one_process(tmp_path: Path) -> None:
    store = make_store(tmp_path, VARIANT, clips=96, shard_size=4, passes=())
    shutil.copytree(tmp_path / "store", tmp_path / "alone" / "store")
    (hold := tmp_path / "hold").touch()
    with fake_cluster({"cpu_worker": {"resources": {"CPU": 1}, "max_workers": 4}}, idle_minutes=5) as cluster, Watch(cluster) as watch:
        command = [sys.executable, "-c", f"from test_autoscaling import held; held({store.root!r}, {str(hold)!r})"]
        with (tmp_path / "pass.log").open("w") as log:
            running = subprocess.Popen(command, env=cluster.environment, cwd=REPO, stdout=log, stderr=log)

        def said() -> str:
            return (tmp_path / "pass.log").read_text() + cluster.logs()

        try:
            wait_until(lambda: len(watch.nodes("Map")) >= 4, 200, said)
            first = watch.nodes("Map")
            assert HEAD not in first and store.missing_shards("mel") and running.poll() is None, said()
            cluster.lose(min(first))
            wait_until(lambda: bool(watch.nodes("Map") - first), 200, said)  # the one that came for it has work
            assert min(first) not in cluster.nodes()
            hold.unlink()
            assert running.wait(90) == 0, said()
        finally:
            running.kill()
    assert store.missing_shards("mel") == []
    alone = FeatureStore.open(tmp_path / "alone" / "store")
    run_here("mel", alone, VARIANT)
    assert len(series(alone)) == 48 and series(store) == series(alone)
