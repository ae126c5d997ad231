"""The extra `clap`: one command that installs it, and sentences that name it where torch and torchvision do not go together."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.public import laion
from stages.public.extra import INSTALL

REPO = Path(__file__).resolve().parent.parent


def place_package(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A package as pip would have installed it, with these sources."""
    (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for path, code in files.items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_text(code)


def test_without_the_package_the_command_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="laion-clap is not installed; .*" + re.escape(INSTALL)):
        laion.package()


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise ModuleNotFoundError(\"No module named 'torchvision'\")", "cannot be imported .No module named 'torchvision'"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "cannot be imported .operator torchvision::nms does not exist"),
    ],
)
def test_what_the_package_lacks_is_named_with_the_command(tmp_path, monkeypatch, code, told):
    place_package(tmp_path, "laion_clap", "1.1.7", {"__init__.py": "", "clap_module/__init__.py": "", "clap_module/model.py": code})
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "laion_clap" not in p)])  # where it is installed, too
    for module in ("clap_module", "clap_module.model"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(UserError, match=f"laion-clap {told}.*" + re.escape(INSTALL)):
        laion.package()
    sys.modules.pop("clap_module", None)


def test_a_torchvision_for_another_torch_gets_a_sentence(tmp_path):
    """One for CUDA beside a torch for the CPU: diffusers and transformers import it unasked and end in a traceback."""
    place_package(tmp_path, "torchvision", "0.28.0", {"__init__.py": "raise RuntimeError('operator torchvision::nms does not exist')"})
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}
    call = [sys.executable, "-m", "loa", "import", "clap.pt", "--verify"]
    done = subprocess.run(call, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"torchvision 0\.28\.0 does not work beside torch 2\..*::nms does not exist.*builds of one kind", done.stderr)
    assert INSTALL in done.stderr


def test_the_command_is_documented_and_installs_the_pinned_torch():
    assert INSTALL in (REPO / "docs" / "running.md").read_text()
    (torch,) = re.findall(r"torch===(\S+)", INSTALL)
    assert f"\ntorch=={torch}\n" in (REPO / "constraints.txt").read_text()


@pytest.mark.slow
def test_the_command_resolves(tmp_path):
    """pip finds versions that go together, torchvision made for that torch; nothing is installed."""
    report = tmp_path / "report.json"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*pip, "download", "--no-deps", "-q", "-d", str(tmp_path), "laion-clap"], capture_output=True).returncode:
        pytest.skip("no package index is within reach")
    dry = [*pip, *shlex.split(INSTALL)[1:], "--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
    done = subprocess.run(dry, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {p["metadata"]["name"].lower().replace("_", "-"): p["metadata"] for p in json.loads(report.read_text())["install"]}
    assert {"loa", "laion-clap"} <= found.keys() and found["numpy"]["version"].startswith("1.")
    needs = [re.sub(r"[ ()]", "", need) for need in found["torchvision"]["requires_dist"]]
    assert f"torch=={found['torch']['version']}" in needs
