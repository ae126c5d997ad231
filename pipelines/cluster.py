"""Joining a Ray cluster, or quietly starting one on this machine, and sizing pools so that they never starve."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import local_ray
from stages.errors import UserError

OBJECT_STORE_BYTES = 400 * 2**20  # units of work are shard numbers: features travel through files, not through Ray

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of tasks that were under way when a command was stopped; all others are fetched
}
_QUIET_LOCAL = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away; saves a process per training
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon the end of a training is noticed
}
_started: str | None = None  # address of the cluster that this process started


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs of a machine or a cluster."""

    cpus: int
    gpus: int
    largest_node_cpus: int


@dataclass(frozen=True)
class Pool:
    """How many workers a step gets, and what each reserves."""

    size: int
    num_cpus: float
    num_gpus: float = 0.0

    @property
    def threads(self) -> int:
        """Threads a worker may use for arithmetic."""
        return max(1, int(self.num_cpus))


def connect(address: str | None = None, num_cpus: int | None = None) -> None:
    """Join the cluster at `address` (or RAY_ADDRESS, set inside a Ray job), else start one on this machine.

    A cluster of this machine offers one CPU more than it has cores, so that a pool as wide as the machine leaves room
    for the task that feeds it. Calling again does nothing.

    Args:
        address: "auto", "host:port" or "ray://host:port".
        num_cpus: CPUs a cluster of this machine offers.

    Raises:
        UserError: no cluster answers at the address.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        local_ray.prepare()
    for name, value in (_QUIET | _QUIET_LOCAL if address == "local" else _QUIET).items():
        os.environ.setdefault(name, value)
    import ray

    _check_answers(address)
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        settings |= {
            "num_cpus": num_cpus or local_resources().cpus + 1,
            "object_store_memory": min(OBJECT_STORE_BYTES, max(100 * 2**20, _shared_memory() * 3 // 4)),
            "include_dashboard": False,
        }
    global _started
    try:
        with _own_signals():
            ray.init(address=address, **settings)
        _started = ray.get_runtime_context().gcs_address if address == "local" else None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"Ray cannot start or join a cluster at {address!r}: {error}") from error
    local_ray.quieten()
    import ray.data  # its loggers exist only now; progress has loa's own bars

    logging.getLogger("ray.data").setLevel(logging.ERROR)


def ends_with_us() -> bool:
    """Whether the joined cluster was started by this process, with which it ends."""
    import ray

    return ray.is_initialized() and _started == ray.get_runtime_context().gcs_address


def local_resources() -> Resources:
    """What this process may use of this machine: cores by affinity and container limit, and GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _container_cores()
    cpus = max(1, min(cores, int(limit))) if limit else cores
    import torch

    return Resources(cpus, torch.cuda.device_count(), cpus)


def cluster_resources() -> Resources:
    """What the joined cluster has."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Resources(
        cpus=int(sum(node.get("CPU", 0) for node in nodes)),
        gpus=int(sum(node.get("GPU", 0) for node in nodes)),
        largest_node_cpus=int(max((node.get("CPU", 0) for node in nodes), default=0)),
    )


def cpu_pool(resources: Resources, units: int, workers: int | None = None) -> Pool:
    """Single-threaded workers for `units` of work: as many as asked for, else all CPUs but one."""
    free = max(1, resources.cpus - 1)
    return Pool(max(1, min(workers or free, free, units)), 1)


def encoder_pool(resources: Resources, units: int, workers: int | None = None) -> Pool:
    """Workers that each hold a network: one per GPU, several sharing one when more are asked for.

    Without GPUs a few workers share the CPUs but one, at up to four threads each unless fewer workers are asked for.
    """
    free = max(1, resources.cpus - 1)
    if resources.gpus:
        size = max(1, min(workers or resources.gpus, units))
        share = 1.0 if size <= resources.gpus else 1.0 / -(-size // resources.gpus)
        return Pool(size, min(4.0, max(0.5, free // size)) if free >= size else free / size, share)
    size = max(1, min(workers or -(-free // 4), free, units))
    return Pool(size, max(1, min(free // size, resources.largest_node_cpus, 8)))


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: `ray.init` puts a bare exit with status 15 in its place."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _check_answers(address: str) -> None:
    """Refuse at once where nothing listens; Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "local", "auto"
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at {address!r} ({error.strerror or error}); "
            "start one with `ray start --head`, or unset RAY_ADDRESS to use this machine"
        ) from error


def _container_cores() -> float | None:
    """The CPU quota of a cgroup v2 container, in cores."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _shared_memory() -> int:
    """Free bytes of /dev/shm, where Ray keeps its objects; the temporary folder's where there is no such place."""
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else "/"
    return shutil.disk_usage(folder).free
