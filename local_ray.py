"""The environment of a Ray that loa starts for itself, which pipelines and serving share.

Ray runs whatever code its processes are sent, so nobody else may reach it: it listens on 127.0.0.1 alone and answers those
alone who know a token. Imports no Ray, which reads these variables when it is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import sys
from pathlib import Path

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"  # the network interface

_FATAL = 3  # RayLogLevel::FATAL

_CLOSED = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # "one machine only", Ray's default on Windows and macOS: it binds to 127.0.0.1
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # Ray prefers it to RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token, and writes no file
}
_DEFAULTS = {
    "GLOO_SOCKET_IFNAME": LOOPBACK,  # else gloo listens on the address that the machine's name has
    "NCCL_SOCKET_IFNAME": LOOPBACK,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this interpreter and this folder
}


def prepare() -> None:
    """Set the environment for a cluster of this process's own, before Ray is imported.

    A token of the user's is for another cluster: it is neither used nor changed. Calling again does nothing.

    Raises:
        RuntimeError: Ray was imported before, without these settings.
    """
    if "ray" in sys.modules and any(os.environ.get(name) != value for name, value in _CLOSED.items()):
        raise RuntimeError("Ray was imported before its settings were made: call local_ray.prepare() first, or join a cluster")
    os.environ.update(_CLOSED)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    # workers import these packages whatever folder the command was started in
    here = str(Path(__file__).resolve().parent)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if here not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *paths])


def quieten() -> None:
    """After `ray.init`: keep Ray's C++ messages off this process's stderr; what fails there is raised in Python as well.

    Fatal ones stay, and so does what is said while Ray starts, since that can end the process. RAY_BACKEND_LOG_LEVEL is
    the user's; as a means it would silence the daemons' log files and announce itself on stderr.
    """
    if "RAY_BACKEND_LOG_LEVEL" in os.environ:
        return
    with contextlib.suppress(ValueError, OSError):  # a Ray without this name is a little louder
        level = ctypes.c_int.in_dll(ctypes.CDLL(sys.modules["ray._raylet"].__file__), "_ZN3ray6RayLog19severity_threshold_E")
        level.value = _FATAL
