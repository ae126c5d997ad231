"""cluster.yaml is a file that Ray's cluster launcher accepts, and asks for what the docs promise."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent


def read() -> dict[str, Any]:
    return yaml.safe_load((REPO / "cluster.yaml").read_text())


def validated(config: dict[str, Any]) -> dict[str, Any]:
    """Ray's own offline check; it has no public name. `prepare_config` fills in what `validate_config` insists on."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_the_launcher_accepts_it() -> None:
    prepared = validated(read())
    assert prepared["head_node_type"] == "head"
    assert prepared["max_workers"] == sum(t["max_workers"] for t in read()["available_node_types"].values() if "max_workers" in t)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda c: c.update(colour="blue"),
        lambda c: c.update(head_node_type="nobody"),
        lambda c: c["available_node_types"]["gpu_worker"]["resources"].update(GPU=0.5),
        lambda c: c["available_node_types"]["gpu_worker"].update(colour="blue"),
    ],
    ids=["unknown key", "unknown head", "half a GPU", "unknown node key"],
)
def test_the_check_sees_mistakes(break_it: Any) -> None:
    config = read()
    break_it(config)
    with pytest.raises(Exception, match=r"(?i)colour|head_node_type|GPU|resource|0\.5"):
        validated(config)


def test_nodes_hold_what_the_passes_and_stages_need() -> None:
    types = read()["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert types["gpu_worker"]["resources"]["GPU"] >= 1
    assert "GPU" not in types["cpu_worker"]["resources"]
    assert {t["node_config"]["ImageId"] for t in types.values()} == {types["head"]["node_config"]["ImageId"]}


def test_nothing_listens_to_the_world() -> None:
    config = read()
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_setup_uses_the_makefile() -> None:
    assert any("make -C ~/loa setup" in command for command in read()["setup_commands"])
    assert "\nsetup:" in (REPO / "Makefile").read_text()
