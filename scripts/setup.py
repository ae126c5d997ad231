"""Make the environment in .venv: run by `make`, with nothing but a Python of 3.11 or later.

torch comes first and alone, because which build it should be depends on the machine: its newest CUDA build brings
several gigabytes that a machine without an NVIDIA GPU has no use for. The rest follows at the versions of
constraints.txt. A second call sees that nothing changed and returns at once; what the installers say goes to .setup.log.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
VENV = REPO / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
LOG = REPO / ".setup.log"
STAMP = VENV / "loa-setup.sha256"
PIP_INSTALL = (PYTHON, "-m", "pip", "install", "--progress-bar", "off", "--no-compile")
EXTRAS = "speech,dev"
NEEDED_GB = {"cpu": 3.0, "cuda": 9.0}


class SetupError(Exception):
    """Something the user has to do first; the text says what."""


def main() -> int:
    wanted = fingerprint()
    if STAMP.is_file() and STAMP.read_text() == wanted and PYTHON.exists():
        return 0
    began = time.monotonic()
    try:
        install()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: stopped; the next `make` continues", file=sys.stderr)
        return 130
    STAMP.write_text(wanted)
    print(f"setup: ready in {time.monotonic() - began:.0f} s", flush=True)
    return 0


def fingerprint() -> str:
    """Changes whenever the environment would come out differently."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {EXTRAS} {REPO}".encode())
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup.py"):
        digest.update((REPO / name).read_bytes())
    return digest.hexdigest()


def install() -> None:
    check_venv()
    gpu = has_nvidia_gpu()
    check_disk(NEEDED_GB["cuda" if gpu else "cpu"])
    LOG.write_text("")
    say(f"making an environment in {VENV.name} (Python {sys.version_info.major}.{sys.version_info.minor}); details in {LOG.name}")
    make_venv()
    run(*PIP_INSTALL, "--upgrade", "pip", "uv", why="pip and uv could not be installed")
    install_torch(gpu)
    say("installing the other packages")
    rest = ["--constraint", REPO / "constraints.txt", "--editable", f"{REPO}[{EXTRAS}]"]
    # uv takes seconds where pip takes minutes, but does not read pip's configuration: on a machine whose packages come
    # from an index of its own, pip is the one that finds them.
    if not tried(PYTHON, "-m", "uv", "pip", "install", "--python", PYTHON, *rest):
        say("uv found no way to install them here; trying pip, which takes a few minutes")
        run(*PIP_INSTALL, *rest, why="the packages could not be installed")


def make_venv() -> None:
    if PYTHON.exists() and tried(PYTHON, "-c", f"import sys, pip; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"):
        return
    if VENV.exists():
        say(f"{VENV.name} was made by another Python; making it anew")
        shutil.rmtree(VENV)
    run(sys.executable, "-m", "venv", VENV, why="the environment could not be made")


# ------------------------------------------------------------------------------------------------------------- torch


def install_torch(gpu: bool) -> None:
    version = pinned("torch")
    if tried(PYTHON, "-c", f"import torch, sys; sys.exit(torch.__version__.partition('+')[0] != {version!r})"):
        return
    torch = f"torch=={version}"
    uv = (PYTHON, "-m", "uv", "pip", "install", "--python", PYTHON, "--constraint", REPO / "constraints.txt", torch)
    if gpu or sys.platform != "linux":  # elsewhere the default build is the CPU's
        say(f"installing {torch}" + (" for this machine's GPU (several gigabytes)" if gpu else ""))
        if not tried(*uv, "--torch-backend=auto"):
            run(*PIP_INSTALL, torch, why=f"{torch} could not be installed")
        return
    say(f"installing {torch} for the CPU (no NVIDIA GPU is visible)")
    if (local := wheel_at_hand(torch)) is not None:
        run(*PIP_INSTALL, f"torch=={local}", why=f"torch=={local} could not be installed")
    elif not tried(*uv, "--torch-backend=cpu"):
        raise SetupError(
            f"no CPU build of {torch} was found: PyTorch's own index could not be reached ({LOG.name} has the words), and the build "
            "on the general index brings several gigabytes of CUDA libraries. Do one of these and call again:\n"
            f"  put a CPU wheel in a folder and set PIP_FIND_LINKS=FOLDER\n"
            f"  install it from an index of yours:   .venv/bin/python -m pip install {torch} --index-url URL\n"
            f"  accept the CUDA build:               .venv/bin/python -m pip install {torch}"
        )


def wheel_at_hand(requirement: str) -> str | None:
    """The version, such as 2.13.0+cpu, of a wheel without CUDA in the folders that pip is told to look in.

    Only folders: asking pip about an index may already download the gigabytes that are to be avoided.
    """
    report = VENV / "torch-report.json"
    try:
        if not tried(*PIP_INSTALL, "--no-index", "--no-deps", "--dry-run", "--report", report, requirement):
            return None
        found = json.loads(report.read_text())["install"][0]["metadata"]
    finally:
        report.unlink(missing_ok=True)
    brings_cuda = any(need.lower().startswith(("nvidia", "cuda", "triton")) for need in found.get("requires_dist", []))
    return None if brings_cuda else str(found["version"])


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    found = re.search(rf"^{package}==(\S+)$", (REPO / "constraints.txt").read_text(), re.MULTILINE)
    if found is None:
        raise SetupError(f"constraints.txt names no version of {package}")
    return found.group(1)


# ----------------------------------------------------------------------------------------------------- this machine


def check_venv() -> None:
    try:
        import ensurepip  # noqa: F401  (Debian splits both off)
        import venv  # noqa: F401
    except ImportError:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise SetupError(
            f"Python {version} ({sys.executable}) comes without its venv module. On Debian or Ubuntu: apt-get install python{version}-venv"
        ) from None


def has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU " in listed.stdout


def check_disk(gigabytes: float) -> None:
    free = shutil.disk_usage(REPO).free / 1e9
    if free < gigabytes and not STAMP.is_file():
        raise SetupError(f"the environment needs about {gigabytes:.0f} GB of disk and {free:.1f} GB are free at {REPO}")


# ---------------------------------------------------------------------------------------------------------- running


def tried(*command: object) -> bool:
    """Run a command with its output in the log; whether it succeeded."""
    # The caller's own Python set-up must not leak into the environment that is being made.
    outside = {"PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "VIRTUAL_ENV", "CONDA_PREFIX"}
    environment = {k: v for k, v in os.environ.items() if k not in outside}
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(map(str, command))}\n")
        log.flush()
        finished = subprocess.run([str(c) for c in command], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, check=False)
    return finished.returncode == 0


def run(*command: object, why: str) -> None:
    if not tried(*command):
        tail = "\n".join("  " + line for line in LOG.read_text().strip().splitlines()[-8:])
        raise SetupError(f"{why}. The last lines of {LOG.name}:\n{tail}")


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
