"""`loa serve`: answer prompts over HTTP, with a page to try it, until interrupted.

On a running cluster the application can also be deployed as `serve run serving.service:build bundle=DIR`.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

import local_ray
from friendly import friendly
from options import PlaceType, shown
from stages.errors import UserError

if TYPE_CHECKING:
    from stages.files import Place

ANSWER_WITHIN = 900  # seconds; a CPU takes its time


def require_free_port(host: str, port: int) -> None:
    """Raise UserError when nothing can listen at host:port."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(
            f"{host} is not an address of this machine; use 127.0.0.1 for this machine only, or 0.0.0.0 for other machines, too"
        ) from error
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError as error:
            raise UserError(f"port {port} needs administrator rights; choose one above 1023 with --port") from error
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}, port {port}: {(error.strerror or str(error)).lower()}; choose another with --port"
            ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def connect(num_replicas: int) -> tuple[int, int]:
    """Join the cluster of RAY_ADDRESS or start one on this machine; returns its CPUs and GPUs."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        local_ray.prepare()
        settings |= {"num_cpus": max(os.cpu_count() or 1, num_replicas) + 1, "object_store_memory": 200 * 2**20, "include_dashboard": False}
    import ray

    try:
        ray.init(address=address, **settings)
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at {address!r} ({error}); start one with `ray start --head` or unset RAY_ADDRESS"
        ) from error
    local_ray.quieten()
    have = ray.cluster_resources()
    return int(have.get("CPU", 1)), int(have.get("GPU", 0))


def run(bundle: Place, host: str, port: int, num_replicas: int, max_batch: int, max_queue: int, max_seconds: float) -> None:
    """Serve `bundle` until interrupted or terminated.

    Raises UserError when the bundle is not whole, the port is taken or the cluster has no room for the replicas.
    """
    from stages.bundle import read_info

    info = read_info(bundle)
    require_free_port(host, port)
    cpus, gpus = connect(num_replicas)
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    from serving.service import ServeArgs, build

    try:
        if gpus and num_replicas > gpus:
            raise UserError(f"{num_replicas} replicas were asked for and there are {gpus} GPUs; choose at most {gpus}")
        args = ServeArgs(
            bundle=str(bundle),
            num_replicas=num_replicas,
            max_batch=max_batch,
            max_queue=max_queue,
            max_seconds=max_seconds,
            num_gpus=1 if gpus else 0,
            threads=None if gpus else max(1, (cpus - 1) // num_replicas),
        )
        quiet = {"log_level": "ERROR", "enable_access_log": False}
        serve.start(http_options={"host": host, "port": port, "request_timeout_s": ANSWER_WITHIN}, logging_config=quiet)
        click.echo(f"Loading {info.variant} from {shown(bundle)} …")
        serve.run(build(args), name="loa", route_prefix="/")
        reached = "localhost" if is_loopback(host) else host
        click.echo(f"Ready at http://{reached}:{port} - a page to try it; the API is POST /v1/audio/generations. Press Ctrl-C to stop.")
        if not is_loopback(host):
            click.echo(
                "Anyone who can reach this address can use it: there is no authentication. Put a proxy with authentication in front.",
                err=True,
            )
        _wait_for_end()
        click.echo("Stopping …")
    finally:
        if os.environ.get("RAY_ADDRESS"):  # other applications of the cluster stay; one of our own ends as a whole
            serve.delete("loa")
        ray.shutdown()


def _wait_for_end() -> None:
    """Return at Ctrl-C or a request to terminate. Called last, because Ray puts handlers of its own in place."""
    end = threading.Event()

    def leave(_: int, __: FrameType | None) -> None:
        end.set()

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, leave)
    end.wait()


@click.command()
@click.option(
    "--bundle",
    type=PlaceType(),
    metavar="DIR",
    help="Bundle to serve, a folder or URL.  [default: $LOA_BUNDLE, or the newest under ./outputs]",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 accepts requests from other machines.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port to listen on.")
@click.option(
    "--num-replicas",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of generators, each on its own GPU if there are any.",
)
@click.option("--max-batch", type=click.IntRange(1), default=4, show_default=True, help="Maximum batch size of one replica.")
@click.option(
    "--max-queue",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="Maximum number of waiting requests; further ones are refused (503).",
)
@click.option("--max-seconds", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True, help="Maximum length of a sound.")
@friendly
def main(bundle: Place | None, host: str, port: int, num_replicas: int, max_batch: int, max_queue: int, max_seconds: float) -> None:
    """Serve a bundle over HTTP, with a page to try it."""
    from stages.bundle import find_bundle

    run(find_bundle(bundle), host, port, num_replicas, max_batch, max_queue, max_seconds)


if __name__ == "__main__":
    main()
