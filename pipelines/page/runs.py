"""The runs of a project folder with their curves, read back from MLflow."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.tracking import EXPERIMENT, RUN_KEY, mlflow, reachable, run_key, tracking_uri
from stages.files import Place


@dataclass(frozen=True)
class Run:
    """What MLflow knows of a job's run. `metrics`: name -> (steps, values), one value per step, in order."""

    run_id: str
    name: str
    job: str
    status: str
    start: float  # seconds since 1970
    end: float | None
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]] = field(default_factory=dict)


def read_runs(work: Path | str | Place, uri: str | None = None, experiment: str = EXPERIMENT) -> list[Run]:
    """The runs of the project folder `work` with their curves, oldest first; the newest of each job and variant.

    The folder's own database belongs to it even if the folder was moved; in a shared store the runs' keys tell.
    """
    uri = tracking_uri(work, uri)
    database = Place.of(work) / "mlflow.db"
    own = uri == f"sqlite:///{database}"
    if own and not database.exists():
        return []
    with reachable(uri):
        client = mlflow().MlflowClient(uri)
        known = client.get_experiment_by_name(experiment)
        if known is None:
            return []
        newest: dict[str, Any] = {}
        token: str | None = None
        while token != "":
            page = client.search_runs([known.experiment_id], order_by=["attributes.start_time ASC"], page_token=token)
            for run in page:
                key = run.data.tags.get(RUN_KEY, "")
                if key and (own or key.startswith(run_key(work, ""))):
                    newest[key] = run
            token = page.token or ""
        return [_read_run(client, run) for run in sorted(newest.values(), key=lambda run: run.info.start_time)]


def _read_run(client: Any, run: Any) -> Run:
    metrics = {}
    for name in run.data.metrics:
        # A step that a restarted job repeated counts once, as it went the last time.
        latest = {m.step: m.value for m in sorted(client.get_metric_history(run.info.run_id, name), key=lambda m: m.timestamp)}
        steps = sorted(latest)
        metrics[name] = np.array(steps, dtype=np.int64), np.array([latest[s] for s in steps], dtype=np.float64)
    return Run(
        run_id=run.info.run_id,
        name=run.info.run_name,
        job=run.data.tags.get("loa.job", run.info.run_name),
        status=run.info.status,
        start=run.info.start_time / 1000,
        end=run.info.end_time / 1000 if run.info.end_time else None,
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        metrics=metrics,
    )
