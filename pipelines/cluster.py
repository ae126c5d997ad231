"""Joining a Ray cluster, or quietly starting one on this machine, and asking it for workers.

A job says what a worker needs and how many it can use. A Ray of this machine is divided so that nothing starves; a cluster that
was joined is asked, whatever nodes it has at the moment: it may start from none.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import local_ray
from options import AS_NEEDED, Reservation, WorkerRange
from stages.errors import UserError

MOST_WORKERS = 1024  # of a pass that was not told how many: what waits for nodes costs little, but not nothing
TRAINING_CPUS = 4.0  # of a worker on a cluster: its GPU's, or `--gpu 0` without one
PATIENCE = 120.0  # seconds that a worker without room waits for a node to join, where no autoscaler is known to bring one
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
class Machine:
    """CPUs and GPUs that this process may use."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Pool:
    """Workers of a job: how many, and what each of them reserves."""

    smallest: int  # are asked for at once
    largest: int  # as there is room
    num_cpus: float
    num_gpus: float = 0.0
    memory: int = 0  # bytes

    def resources(self) -> dict[str, float]:
        """What a worker reserves, by the names of Ray's resources."""
        return {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": self.memory}

    def reserves(self) -> dict[str, float]:
        """What a worker reserves, in the words of Ray's options."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus} | ({"memory": self.memory} if self.memory else {})

    def fit(self, node: Mapping[str, float]) -> int:
        """How many workers a node of these resources holds, were it idle. A type that does not tell its memory is believed."""
        there = {"CPU": 0.0, "GPU": 0.0, "memory": math.inf} | dict(node)
        return int(min((there[name] / amount for name, amount in self.resources().items() if amount), default=0))

    def worker(self) -> str:
        """What a worker reserves, for people."""
        return _words(self.resources())


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
            "num_cpus": num_cpus or this_machine().cpus + 1,
            "object_store_memory": min(OBJECT_STORE_BYTES, max(100 * 2**20, _shared_memory() * 3 // 4)),
            "include_dashboard": False,
        }
    global _started
    try:
        with _own_signals():
            ray.init(address=address, **settings)
        _started = ray.get_runtime_context().gcs_address if address == "local" else None
    except Exception as error:
        # Of a start that took too long Ray raises a bare Exception.
        if type(error) is not Exception and not isinstance(error, (ConnectionError, RuntimeError, ValueError, TimeoutError)):
            raise
        raise UserError(f"Ray cannot start or join a cluster at {address!r}: {error}") from error
    local_ray.quieten()
    import ray.data  # its loggers exist only now; progress has loa's own bars

    logging.getLogger("ray.data").setLevel(logging.ERROR)


def ends_with_us() -> bool:
    """Whether the joined cluster was started by this process, with which it ends."""
    import ray

    return ray.is_initialized() and _started == ray.get_runtime_context().gcs_address


def this_machine() -> Machine:
    """What this process may use of this machine: cores by affinity and container limit, and GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _container_cores()
    import torch

    return Machine(max(1, min(cores, int(limit))) if limit else cores, torch.cuda.device_count())


# ------------------------------------------------------------------------------------------------- asking for workers


def pool(needs: Reservation, units: int, workers: WorkerRange = None, reserve: Reservation = AS_NEEDED) -> Pool:
    """Workers for `units` pieces of work on the joined cluster.

    Args:
        needs: what the job's own property is: a worker's CPUs (more than one are a wish where the machine is small), GPUs and memory.
        workers: how many at once, or the smallest and the largest number. By default as many as fit on a Ray of this machine; on a
            cluster from one up to what its autoscaler may bring up for them, or `MOST_WORKERS`.
        reserve: what the user wants in place of `needs`.
    """
    import ray

    smallest, largest = _bounds(workers)
    if not ends_with_us():
        wanted = reserve.over(needs)
        each = Pool(1, 1, wanted.cpus or 1, wanted.gpus or 0, wanted.memory or 0)
        room = sum(kind["max_workers"] * each.fit(kind["resources"]) for kind in _suitable(each).values())
        largest = min(largest or MOST_WORKERS, units, room or MOST_WORKERS)
        return replace(each, smallest=min(smallest, largest), largest=largest)
    total = ray.cluster_resources()  # of this machine alone, and for good
    return divide(Machine(int(total.get("CPU", 1)), int(total.get("GPU", 0))), needs, units, largest, reserve)


def worker_group(workers: WorkerRange = None, reserve: Reservation = AS_NEEDED) -> Pool:
    """Workers that train together, all of them or none: by default one per GPU of this machine, or of the nodes that are up.

    Raises:
        UserError: a range of numbers was given, or this machine has fewer GPUs.
    """
    import ray

    smallest, largest = _bounds(workers)
    if largest is not None and smallest != largest:
        raise UserError(
            f"training takes a fixed number of workers and was given {smallest} to {largest}; give one, such as --workers {largest}"
        )
    ours, there = ends_with_us(), int(ray.cluster_resources().get("GPU", 0))
    gpus = reserve.gpus if reserve.gpus is not None else 1 if there or not ours else 0
    count = largest or (max(1, int(there / gpus)) if gpus else 1)
    if ours and count * gpus > there:
        raise UserError(f"{count} workers with {gpus:g} GPUs each were asked for and this machine has {there}; choose fewer, or --gpu 0")
    cores = this_machine().cpus
    cpus = reserve.cpus or ((cores // count or cores / count) if ours else TRAINING_CPUS)
    return Pool(count, count, cpus, gpus, reserve.memory or 0)


def divide(machine: Machine, needs: Reservation, units: int, workers: int | None = None, reserve: Reservation = AS_NEEDED) -> Pool:
    """The pool that uses one machine as far as `workers` allows and leaves a CPU for the task that feeds it.

    Workers that want a GPU get one each, or a share when more workers are asked for; where there is none they get CPUs.
    Workers that want several CPUs get up to twice as many when fewer of them leave these free.
    """
    free = max(1, machine.cpus - 1)
    cpus, gpus, memory = needs.cpus or 1, needs.gpus if machine.gpus else 0, reserve.memory or 0
    if reserve.gpus is not None:
        gpus = reserve.gpus
    if gpus:
        size = max(1, min(workers or int(machine.gpus / gpus), units))
        if reserve.gpus is None and size > machine.gpus:
            gpus = 1.0 / -(-size // machine.gpus)
        each = min(cpus, max(0.5, free // size)) if free >= size else free / size
    elif reserve.cpus:
        each, size = reserve.cpus, max(1, min(workers or int(free / reserve.cpus), units))
    else:
        size = max(1, min(workers or math.ceil(free / cpus), free, units))
        each = max(1, min(free // size, 2 * cpus)) if cpus > 1 else 1
    return Pool(size, size, reserve.cpus or each, gpus or 0, memory)


def await_room(wanted: Pool, job: str, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)) -> None:
    """Return once the cluster has a node that can hold a worker of `wanted`; ask its autoscaler for nodes meanwhile.

    A node that is merely busy counts as there. Where the autoscaler has a type of node for the worker, this waits as long as that
    takes and says so; where it has none, or there is no autoscaler that can be asked, `PATIENCE` seconds for a node to join.

    Raises:
        UserError: nothing the cluster has or could start holds a worker.
    """
    import ray

    if _holds(wanted):
        return
    if ends_with_us():
        raise UserError(_too_much(wanted, job, {}))
    types, suitable = _node_types(), _suitable(wanted)
    if types and not suitable:
        raise UserError(_too_much(wanted, job, types))

    @ray.remote(max_retries=0, **wanted.reserves())
    def room() -> None:
        """Nothing; while it waits for its place, the autoscaler sees what is wanted."""

    waiting = [room.remote() for _ in range(wanted.largest)]
    say(f"{job}: waiting for a node with {wanted.worker()}" + (f", of type {' or '.join(sorted(suitable))}" if suitable else ""))
    began = time.monotonic()
    try:
        while not _holds(wanted):
            if not suitable and time.monotonic() - began > PATIENCE:
                raise UserError(_too_much(wanted, job, types))
            time.sleep(1)
    finally:
        for one in waiting:
            ray.cancel(one, force=True)


def given() -> tuple[int, str]:
    """Threads and device of the Ray worker in which this is called: what it was given, whatever its node has.

    Raises:
        UserError: it was given a GPU, and PyTorch sees none.
    """
    import ray
    import torch

    context = ray.get_runtime_context()
    resources = context.get_assigned_resources()
    if resources.get("GPU") and not torch.cuda.is_available():
        raise UserError(
            f"a worker was given a GPU of node {context.get_node_id()}, and PyTorch {torch.__version__} sees none there; "
            "install a build of PyTorch for that GPU on all nodes, or give `--gpu 0` to compute on CPUs"
        )
    return max(1, int(resources.get("CPU", 1))), "cuda" if resources.get("GPU") else "cpu"


def _bounds(workers: WorkerRange) -> tuple[int, int | None]:
    return (workers, workers) if isinstance(workers, int) else workers or (1, None)


def _holds(wanted: Pool) -> bool:
    import ray

    return any(node["Alive"] and wanted.fit(node["Resources"]) for node in ray.nodes())


def _too_much(wanted: Pool, job: str, types: Mapping[str, Mapping[str, Any]]) -> str:
    """The sentence on a worker that nothing can hold."""
    import ray

    nodes = [_words(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    have = [f"{kind} ({nodes.count(kind)})" if nodes.count(kind) > 1 else kind for kind in dict.fromkeys(nodes)]
    can = [f"{name}: {_words(kind['resources'])}, at most {kind['max_workers']}" for name, kind in types.items() if kind["max_workers"]]
    what = f"a worker of {job} needs {wanted.worker()}"
    where = "this machine has" if ends_with_us() else "the cluster's nodes have"
    sentence = f"{what}, and {where} {'; '.join(have)}" + (f"; it can start nodes of type {'; '.join(can)}" if can else "")
    without = ", or `--gpu 0` to compute on CPUs" if wanted.num_gpus else ""
    return f"{sentence}. Ask for less with --cpu, --gpu or --memory{without}, or add a node that can hold it"


def _words(node: Mapping[str, float]) -> str:
    """CPUs, GPUs and memory of a node or worker, in words."""
    cpus, gpus, memory = node.get("CPU", 0), node.get("GPU", 0), node.get("memory", 0)
    words = [f"{cpus:g} CPU{'' if cpus == 1 else 's'}"]
    words += [f"{gpus:g} GPU{'' if gpus == 1 else 's'}"] if gpus else []
    words += [f"{memory / 1e9:.1f} GB of memory"] if memory else []
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1]


def _suitable(wanted: Pool) -> dict[str, dict[str, Any]]:
    """Those of the autoscaler's types of nodes that are for such workers.

    Nodes with GPUs are not for workers without, unless there are no others: a demand beyond what the others can hold would start
    them, the dearest ones, for a work that never uses them.
    """
    kinds = {name: kind for name, kind in _node_types().items() if kind["max_workers"] and wanted.fit(kind["resources"])}
    plain = {name: kind for name, kind in kinds.items() if not kind["resources"].get("GPU")}
    return plain if plain and not wanted.num_gpus else kinds


def _node_types() -> dict[str, dict[str, Any]]:
    """Types of nodes that the cluster's autoscaler may start: name → `resources` and `max_workers`; {} if they cannot be known."""
    import ray

    return _declared_types(ray.get_runtime_context().gcs_address)


@functools.cache
def _declared_types(address: str) -> dict[str, dict[str, Any]]:
    """Ray tells nobody, but the autoscaler runs on the head with the path of its configuration in its command line."""
    import ray

    @ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001}, max_retries=0)
    def read() -> dict[str, dict[str, Any]]:
        import psutil
        import yaml

        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            files = [word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")]
            if files and f"--gcs-address={address}" in words:
                config = yaml.safe_load(Path(files[0]).expanduser().read_text())
                most = config.get("max_workers", 0)
                return {
                    name: {"resources": kind.get("resources", {}), "max_workers": min(most, kind.get("max_workers", most))}
                    for name, kind in config["available_node_types"].items()
                    if name != config["head_node_type"]
                }
        return {}

    try:
        types: dict[str, dict[str, Any]] = ray.get(read.remote(), timeout=30)
    except (ray.exceptions.RayError, OSError):
        return {}
    return types


# --------------------------------------------------------------------------------------------------- a Ray of our own


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
