"""A Ray cluster on this machine that grows and shrinks by itself: Ray's own autoscaler, whose nodes are processes here.

Ray's `AutoscalingCluster` reads a file that its wheel does not carry, and ends every Ray of the machine when it stops. This one
listens on 127.0.0.1, asks for the token of these tests (conftest.py) and ends its own processes alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

REPO = Path(__file__).resolve().parent.parent
HEAD = "f" * 51 + "00000"  # the id that Ray's provider of simulated nodes gives its head; the others count on from it
PORTS = range(20000, 32000)  # below: Ray's workers, which it refuses; above: what this machine gives to whoever asks

# Keys that Ray's launcher fills in. Without one of them the autoscaler dies of a KeyError that only its log file shows.
_FILLED_IN: dict[str, Any] = {"auth": {}, "file_mounts": {}, "file_mounts_sync_continuously": False} | {
    key: []
    for key in (
        "cluster_synced_files",
        "rsync_exclude",
        "rsync_filter",
        "initialization_commands",
        "setup_commands",
        "head_setup_commands",
        "worker_setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    )
}


@dataclass(frozen=True)
class FakeCluster:
    """One that runs: where it is, and what of it can be seen from outside."""

    address: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """For commands that shall use it."""
        return os.environ | {"RAY_ADDRESS": self.address, "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}"}

    def run(self, *command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """`python -m COMMAND` on this cluster, to its end."""
        return subprocess.run(
            [sys.executable, "-m", *command], env=self.environment, cwd=REPO, capture_output=True, text=True, timeout=timeout
        )

    def nodes(self) -> dict[str, dict[str, float]]:
        """Resources of the nodes that are up, by node id; the head's is HEAD."""
        from ray._raylet import GcsClient

        infos = GcsClient(address=self.address).get_all_node_info(timeout=30)
        return {node.hex(): dict(info.resources_total) for node, info in infos.items() if info.state == 0}

    def at_work(self) -> set[tuple[str, str]]:
        """(node id, name) of every task and actor that is there now."""
        names = [(node, " ".join(_words(worker)).strip()) for node, raylet in self._raylets() for worker in _children(raylet)]
        return {(node, name.removeprefix("ray::")) for node, name in names if name.startswith("ray::") and name != "ray::IDLE"}

    def lose(self, node: str) -> None:
        """Let a node fail: its daemon is killed, and what runs there ends with it."""
        for name, raylet in self._raylets():
            if name == node:
                raylet.kill()

    def _raylets(self) -> list[tuple[str, psutil.Process]]:
        """(node id, the daemon of that node)."""
        flag = "--node_id="
        return [(word.removeprefix(flag), p) for p in _naming(self.folder) for word in _words(p) if word.startswith(flag)]

    def logs(self) -> str:
        """What the autoscaler said, for the message of a failed test."""
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in self.folder.glob("session_*/logs/monitor.*"))


def autoscaling(node_types: Mapping[str, Mapping[str, Any]], address: str, idle_minutes: float) -> dict[str, Any]:
    """The autoscaler's configuration: a head that computes nothing, and these types of workers from zero nodes upwards."""
    head = {"resources": {"CPU": 0}, "max_workers": 0, "node_config": {}}
    workers = {
        name: {
            "resources": {"object_store_memory": 100_000_000} | dict(kind["resources"]),
            "min_workers": 0,
            "max_workers": kind["max_workers"],
            "node_config": {},
            "labels": dict(kind.get("labels", {})),
        }
        for name, kind in node_types.items()
    }
    return _FILLED_IN | {
        "cluster_name": "simulated",
        "max_workers": sum(kind["max_workers"] for kind in workers.values()),
        "upscaling_speed": 10,
        "idle_timeout_minutes": idle_minutes,
        "provider": {
            "type": "external",
            "module": "fake_provider.Provider",
            "gcs_address": address,
            "head_node_id": HEAD,
            "launch_multiple": True,
            "use_node_id_as_ip": True,  # all nodes share one address
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {"ray.head.default": head} | workers,
        "head_node_type": "ray.head.default",
    }


@contextlib.contextmanager
def fake_cluster(node_types: Mapping[str, Mapping[str, Any]], idle_minutes: float = 0.2) -> Iterator[FakeCluster]:
    """A cluster of a head without CPUs that starts nodes as they are asked for, and ends them when they idle.

    Args:
        node_types: name -> `resources` and `max_workers` (and `labels`), as under `available_node_types` of a cluster's file.
        idle_minutes: how long a node without work stays.
    """
    folder = Path(tempfile.mkdtemp(prefix="loa-ray-"))  # not the test's: names of sockets have 107 characters at most
    port = _free_port()
    address = f"127.0.0.1:{port}"
    config = folder / "autoscaling.yaml"
    config.write_text(yaml.safe_dump(autoscaling(node_types, address, idle_minutes)))
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", f"--port={port}"]
    command += ["--node-ip-address=127.0.0.1", "--num-cpus=0", f"--autoscaling-config={config}", f"--temp-dir={folder}"]
    command += ["--object-store-memory=100000000", "--include-dashboard=false", "--disable-usage-stats"]
    environment = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "5",  # until a node that was lost is replaced
        "RAY_worker_niceness": "0",
        "RAY_prestart_worker_first_driver": "0",  # a process per CPU that a node claims to have
        "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}",
    }
    environment.pop("RAY_ADDRESS", None)
    try:
        with (folder / "start.log").open("w+") as log:  # a file: the daemons inherit it, and the end of a pipe would never come
            started = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=180)
        assert started.returncode == 0, (folder / "start.log").read_text()
        yield FakeCluster(address, folder)
    finally:
        _end_processes(folder)
        shutil.rmtree(folder, ignore_errors=True)


class Watch:
    """Who works where on a cluster, looked at every half second in a `with` block.

    Attributes:
        resources: of every node that had work, by id; nodes end soon after it.
    """

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster, self.seen, self._end = cluster, set[tuple[str, str]](), threading.Event()
        self.resources: dict[str, dict[str, float]] = {}

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.5):
            self.seen |= self.cluster.at_work()
            if {node for node, _ in self.seen} - set(self.resources):
                self.resources |= self.cluster.nodes()

    def nodes(self, name: str) -> set[str]:
        """Nodes on which a task or actor was seen whose name begins so."""
        return {node for node, task in self.seen if task.startswith(name)}


def wait_until(condition: Callable[[], bool], seconds: float, what: Callable[[], str] = lambda: "") -> None:
    """Wait for a condition; fail with `what()` when the seconds are over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


def _free_port() -> int:
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _end_processes(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while (daemons := _naming(folder)) and time.monotonic() < deadline:  # some start others while they end
        for process in daemons + [child for daemon in daemons for child in _children(daemon)]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.2)


def _naming(folder: Path) -> list[psutil.Process]:
    """Processes that name a folder in their command line or environment: Ray's, and what they have started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(folder) in " ".join([*process.cmdline(), *process.environ().values()]):
                found.append(process)
    return found


def _words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children()
    return []
