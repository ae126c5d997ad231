"""Whether all workers of a training reach the same folder: asked before they are started."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines import cluster
from pipelines.training.identity import BEGUN
from stages.errors import UserError
from stages.files import Place

if TYPE_CHECKING:
    from pipelines.cluster import Pool

PATIENCE = 120.0  # seconds that a node may take to start a task
CURE = "name one with --runs, such as a network mount or s3://BUCKET/runs"


def require_shared(run: Place, pool: Pool) -> None:
    """Let every node that can hold a worker read what this process writes into `run`, and this process what they write.

    Raises UserError naming the nodes where that fails. The disk of one machine is not asked.
    """
    import ray

    if run.local and cluster.ends_with_us():
        return
    token = uuid.uuid4().hex
    (run / f".shared.{token}").write(token.encode())
    nodes = [node for node in ray.nodes() if node["Alive"] and pool.fit(node["Resources"])]
    try:
        ask = ray.remote(num_cpus=0, max_retries=0)(_answer)
        asked = {node["NodeID"]: ask.options(scheduling_strategy=_on(node)).remote(run.url, token, node["NodeID"]) for node in nodes}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=PATIENCE)
        faults = {_name(node): _fault(run, token, node["NodeID"], asked[node["NodeID"]]) for node in nodes}
    finally:
        for name in run.list():
            if token in name:
                (run / name).remove()
    if told := [f"{name} {fault}" for name, fault in faults.items() if fault]:
        raise UserError(f"checkpoints need a folder that all nodes share, and {run} is none: {'; '.join(told)}; {CURE}")


def require_seen(run: Place) -> None:
    """For a worker, whose node may have joined since: raise UserError if it does not see the run that the driver began."""
    if not (run / BEGUN).exists():
        import ray

        node = ray.util.get_node_ip_address()
        raise UserError(f"checkpoints need a folder that all nodes share, and node {node} does not see the run in {run}; {CURE}")


def _answer(url: str, token: str, node: str) -> str:
    """On a node: read what the driver left, leave an answer beside it; what was in the way, "" for nothing."""
    run = Place.of(url)
    try:
        if (run / f".shared.{token}").read() != token.encode():
            return "reads something else there"
    except FileNotFoundError:
        return "does not see what this process writes there"
    except (OSError, UserError) as error:
        return f"cannot read it ({error})"
    try:
        (run / f".shared.{token}.{node}").write(token.encode())
    except OSError as error:
        return f"cannot write there ({error})"
    return ""


def _fault(run: Place, token: str, node: str, task: Any) -> str:
    import ray

    try:
        if fault := ray.get(task, timeout=0):
            return str(fault)
    except ray.exceptions.GetTimeoutError:
        return f"did not answer within {PATIENCE:.0f} s"
    except ray.exceptions.RayError as error:
        return f"could not be asked ({type(error).__name__})"
    return "" if (run / f".shared.{token}.{node}").exists() else "writes to another folder of that name"


def _on(node: Mapping[str, Any]) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def _name(node: Mapping[str, Any]) -> str:
    return f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})"
