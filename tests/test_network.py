"""What listens while loa runs, and what strangers reach of it: from another machine, and from this one without the token."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tiny_store import make_store, small

from serving import app

TESTS = Path(__file__).resolve().parent
CPP_MESSAGE = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\].*|\S+\.cc:\d+.*")
AGENT = 52365  # where Ray's dashboard agent takes jobs
TASK = """
import os, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
marker = sys.argv[2]
ray.get(ray.remote(lambda: os.mkdir(marker)).remote())
"""


@dataclass(frozen=True)
class Place:
    """From where a stranger attacks: the start of its command lines, and the addresses that it knows of this machine."""

    prefix: tuple[str, ...]
    addresses: tuple[str, ...]


def clean(home: Path) -> dict[str, str]:
    """This environment without anything that Ray would read, and with another home folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GLOO_", "NCCL_"))}
    return kept | {"HOME": str(home), "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}


def listening(pid: int) -> dict[tuple[str, int], str]:
    """Address and port -> the process, for every TCP socket on which a process and its descendants accept connections."""
    found = {}
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            name = " ".join(process.cmdline()[:1])
            sockets = process.net_connections("tcp")
        except psutil.Error:  # it ended meanwhile
            continue
        for one in sockets:
            if one.status == psutil.CONN_LISTEN:
                found[one.laddr.ip.removeprefix("::ffff:"), one.laddr.port] = name
    return found


def exposed(sockets: dict[tuple[str, int], str]) -> dict[tuple[str, int], str]:
    """Those that others than this machine can reach."""
    return {where: name for where, name in sockets.items() if not ipaddress.ip_address(where[0]).is_loopback}


def own_address() -> str | None:
    """The address that this machine has for others; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


@pytest.fixture(scope="module")
def outside() -> Iterator[Place]:
    """A network namespace with a cable to this machine; without the right to make one, this machine by its outer address."""
    name, here, there = f"loa-{os.getpid()}", f"loa{os.getpid()}a", f"loa{os.getpid()}b"
    net = f"198.18.{os.getpid() % 256}."  # kept for tests of networks (RFC 2544)
    steps = (
        f"netns add {name}",
        f"link add {here} type veth peer name {there} netns {name}",
        f"addr add {net}1/30 dev {here}",
        f"link set {here} up",
        f"-n {name} addr add {net}2/30 dev {there}",
        f"-n {name} link set {there} up",
        f"-n {name} link set lo up",
        f"-n {name} route add default via {net}1",
    )
    known = tuple(filter(None, [own_address()]))
    try:
        for step in steps:
            subprocess.run(["ip", *step.split()], check=True, capture_output=True)
        place = Place(("ip", "netns", "exec", name), (f"{net}1", *known))
    except (OSError, subprocess.CalledProcessError):
        place = Place((), known)
    try:
        if not place.addresses:
            pytest.skip("this machine has no address for others, and no right to make a network namespace")
        yield place
    finally:
        if place.prefix:
            subprocess.run(["ip", "netns", "del", name], check=True)  # the cable goes with it


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[str]
    url: str
    sockets: dict[tuple[str, int], str]
    home: Path

    def port_of(self, name: str) -> list[int]:
        return sorted(port for (_, port), process in self.sockets.items() if name in process)


@pytest.fixture(scope="module")
def server(bundle: Path, outside: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`loa serve` as a user runs it, in an environment that knows nothing of Ray."""
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "serving.app", "--bundle", str(bundle), "--port", str(port)]
    with (home / "stderr").open("w") as errors:
        process = subprocess.Popen(command, cwd=home, env=clean(home), stdout=subprocess.PIPE, stderr=errors, text=True)
    watchdog = threading.Timer(400, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None and any("Ready at" in line for line in process.stdout), (home / "stderr").read_text()
        yield Server(process, f"http://127.0.0.1:{port}", listening(process.pid), home)
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def attack(sockets: dict[tuple[str, int], str], place: Place, folder: Path) -> dict[str, dict[str, str]]:
    """Both attacks of stranger.py on the port of every socket."""
    targets = [f"{address}:{port}" for address in place.addresses for _, port in sockets]
    command = [*place.prefix, sys.executable, str(TESTS / "stranger.py"), str(folder), *targets]
    done = subprocess.run(command, env=clean(folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results: dict[str, dict[str, str]] = json.loads(done.stdout)
    return results


@contextlib.contextmanager
def tunnel(host: str, port: int) -> Iterator[str]:
    """An address on `host` whose connections end at `port` of 127.0.0.1."""

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                outer, inner = entry.accept()[0], socket.create_connection(("127.0.0.1", port))
                ends.extend((outer, inner))
                for pair in ((outer, inner), (inner, outer)):
                    threading.Thread(target=copy, args=pair, daemon=True).start()

    ends: list[socket.socket] = []
    with socket.create_server((host, 0)) as entry:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"{host}:{entry.getsockname()[1]}"
        finally:
            entry.shutdown(socket.SHUT_RDWR)
            for end in ends:
                end.close()


def join(address: str, place: Place, folder: Path) -> str:
    """What `ray start --address=…` says; if it joins, a task of the stranger's makes a folder in `folder`."""
    log = folder / "join.log"
    start = [*place.prefix, sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=1", "--block"]
    with log.open("w") as said:
        node = subprocess.Popen(start, env=clean(folder), stdout=said, stderr=said, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while node.poll() is None and time.monotonic() < deadline:
            if "Ray runtime started" in log.read_text():
                task = [*place.prefix, sys.executable, "-c", TASK, address, str(folder / "task")]
                subprocess.run(task, env=clean(folder), timeout=120, capture_output=True)
                break
            time.sleep(0.2)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()
    return log.read_text()


@pytest.mark.slow
def test_serving_listens_on_loopback_but_for_the_replicas(server: Server) -> None:
    """Serve binds its replicas to every address, and leaves no choice; they want the token."""
    assert server.port_of("DashboardAgent") and server.port_of("gcs_server") and server.port_of("raylet")
    open_to_others = exposed(server.sockets)
    assert open_to_others and all(name.startswith("ray::ServeReplica:") for name in open_to_others.values()), open_to_others


@pytest.mark.slow
def test_other_machines_run_nothing(server: Server, outside: Place, tmp_path: Path) -> None:
    results = attack(server.sockets, outside, tmp_path)
    assert list(tmp_path.iterdir()) == []
    replicas = {port for _, port in exposed(server.sockets)}
    for address, result in results.items():
        if int(address.rpartition(":")[2]) in replicas:
            assert result["pickle"] == "UNAUTHENTICATED", address
        else:
            assert result == {"job": "closed", "pickle": "closed"}, address


@pytest.mark.slow
def test_without_the_token_this_machine_runs_nothing_either(server: Server, tmp_path: Path) -> None:
    """As another user of the machine: Ray's ports answer, and refuse."""
    here = Place((), ("127.0.0.1",))
    ours = listening(os.getpid())  # with the cluster that other tests share: only one Ray of a machine gets the agent's port
    results = attack(ours, here, tmp_path)
    assert list(tmp_path.iterdir()) == []
    if ours.get(("127.0.0.1", AGENT), "").startswith("ray::DashboardAgent"):  # and that one may be another user's
        assert results[f"127.0.0.1:{AGENT}"]["job"] == "401"
    assert {results[f"127.0.0.1:{port}"]["pickle"] for _, port in exposed(server.sockets)} == {"UNAUTHENTICATED"}


@pytest.mark.slow
def test_nobody_joins_without_the_token(server: Server, outside: Place, tmp_path: Path) -> None:
    """Even where something lets another machine through to Ray's 127.0.0.1, as a tunnel would."""
    with tunnel(outside.addresses[0], server.port_of("gcs_server")[0]) as address:
        said = join(address, outside, tmp_path)
    assert "Ray runtime started" not in said and re.search("(?i)unauthenticated|authentication", said), said
    assert not (tmp_path / "task").exists()


@pytest.mark.slow
def test_loa_serve_answers_and_ends(server: Server) -> None:
    """The last test of this server: it generates, ends at SIGTERM, and leaves neither a process nor a token behind."""
    body = json.dumps({"prompt": "a dog", "num_inference_steps": 1}).encode()
    request = urllib.request.Request(f"{server.url}/v1/audio/generations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=400) as answer:
        assert answer.status == 200 and answer.read(4) == b"RIFF"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    app.require_free_port("127.0.0.1", int(server.url.rpartition(":")[2]))
    assert not (server.home / ".ray").exists()
    assert (server.home / "stderr").read_text() == ""


def observe(command: list[str], home: Path) -> tuple[dict[tuple[str, int], str], set[str], str]:
    """Every listening socket that was there at some time during a command, the names that their processes went by (Ray
    renames a process with its task, and reuses it), and what the command left on stderr.
    """
    sockets: dict[tuple[str, int], str] = {}
    names: set[str] = set()
    with (home / "stderr").open("w") as errors:
        process = subprocess.Popen([sys.executable, "-m", *command], cwd=home, env=clean(home), stdout=subprocess.DEVNULL, stderr=errors)
    watchdog = threading.Timer(400, process.kill)
    watchdog.start()
    try:
        while process.poll() is None:
            try:
                now = listening(process.pid)
            except psutil.NoSuchProcess:
                break
            sockets |= now
            names |= set(now.values())
            time.sleep(0.05)  # a worker of a tiny pass lives for less than a second on a fast machine
        assert process.wait() == 0, (home / "stderr").read_text()
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
    return sockets, names, (home / "stderr").read_text()


@pytest.mark.slow
def test_trainings_and_passes_listen_to_nobody_and_end_in_silence(tmp_path: Path) -> None:
    """Both steps of a demo, on Ray: a training, and a pass with an encoder."""
    make_store(tmp_path, small())
    common = ["--work", str(tmp_path), "--tiny"]
    short = ["--set", "recipes.audiomae.steps=2", "--set", "recipes.audiomae.global_batch=4"]
    for command, worker in (
        (["pipelines.train", "audiomae", *common, *short, "--workers", "1"], "ray::RayTrainWorker"),
        (["pipelines.preprocess", "loa", *common], "ray::MapWorker"),
    ):
        sockets, names, said = observe(command, tmp_path)
        assert any(name.startswith(worker) for name in names), names
        assert exposed(sockets) == {}
        assert not CPP_MESSAGE.findall(said), said
    assert not (tmp_path / ".ray").exists()
