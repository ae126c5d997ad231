"""MLflow: one run per job, found again by its key, so that a restarted job continues its own curves.

A run's key is `<work>/<job>/<variant>` in the tag `loa.run_key`: nothing about runs is kept beside MLflow itself. The
default store is `<work>/mlflow.db` with files in `<work>/mlartifacts`; any other tracking URI works as well.
"""

from __future__ import annotations

import json
import logging
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pipelines.outbox import Outbox
from stages.config import to_dict
from stages.errors import UserError
from stages.files import Place, code_version, weights_hash

EXPERIMENT = "loa"
RUN_KEY = "loa.run_key"

_MOST_PARAMS = 100
_LONGEST_PARAM = 6000  # characters
_LONGEST_TAG = 8000
_UNFIT_FOR_NAMES = re.compile(r"[^A-Za-z0-9_\-./ ]|\.\.")

log = logging.getLogger(__name__)


@cache
def mlflow() -> ModuleType:
    """MLflow, imported when first needed (it takes seconds), without telemetry and without database chatter."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # a server that is away must not hold up training for minutes
    import mlflow

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def tracking_uri(work: Path | str | Place, given: str | None = None) -> str:
    """Where runs of the project folder `work` go: `given`, else MLFLOW_TRACKING_URI, else the folder's own database."""
    uri = given or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    if "://" in str(work):
        raise UserError(
            f"{work} is not a local folder, so it cannot contain MLflow's database; run `mlflow server` where all nodes reach it, "
            "and name it with --tracking-uri or MLFLOW_TRACKING_URI"
        )
    return f"sqlite:///{Place.of(work) / 'mlflow.db'}"


@dataclass(frozen=True)
class RunHandle:
    """Which run to write to. Travels to Ray workers; the empty handle stands for no tracking."""

    uri: str = ""
    run_id: str = ""
    unsent: str = ""  # folder for what waits for a store that is away


class Tracker:
    """Writes one MLflow run. As a context manager it ends the run as FINISHED, FAILED or KILLED.

    Metrics are sent in batches, sounds, pictures and files at once. What a server does not take for the moment is kept and tried
    again; what is still waiting when the tracker is closed, collected or the interpreter exits is sent then, or left in
    `<work>/unsent/`, from where the next call sends it.
    """

    def __init__(self, handle: RunHandle, owner: bool) -> None:
        self._handle, self._owner = handle, owner
        self._client = mlflow().MlflowClient(handle.uri) if handle.run_id else None
        self._outbox = Outbox(self._client, handle.run_id, Path(handle.unsent) if handle.unsent else None)
        self._send_at_exit = weakref.finalize(self, self._outbox.close)

    # ---------------------------------------------------------------------------------------------- opening and closing

    @classmethod
    def open(
        cls,
        uri: str | None = None,
        *,
        work: Path | str | Place,
        job: str,
        variant: str = "",
        name: str | None = None,
        experiment: str = EXPERIMENT,
        parent: Tracker | RunHandle | None = None,
        tags: Mapping[str, str] | None = None,
        fresh: bool = False,
    ) -> Tracker:
        """Begin the run of a job, or continue it if an earlier call began it.

        Args:
            uri: see `tracking_uri`.
            work: project folder; with `job` and `variant` it identifies the run.
            job: "train-vae", "evaluate", ...
            name: what the run is called in the UI; by default the job's name.
            parent: the run under which this one is shown, such as a demo's.
            fresh: begin a new run even if there is an earlier one, which keeps its history.
        """
        uri = tracking_uri(work, uri)
        with reachable(uri):
            client = mlflow().MlflowClient(uri)
            experiment_id = _experiment(client, experiment, uri)
            key = run_key(work, job, variant)
            known = [] if fresh else client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{key}'", max_results=1)
            all_tags = {RUN_KEY: key, "loa.job": job, "loa.code_version": code_version(), **(tags or {})}
            if variant:
                all_tags.setdefault("loa.variant", variant)
            if re.fullmatch(r"[0-9a-f]{40}\+?", all_tags["loa.code_version"]):
                all_tags["mlflow.source.git.commit"] = all_tags["loa.code_version"].rstrip("+")
            if parent is not None and (above := parent.handle() if isinstance(parent, Tracker) else parent).run_id:
                all_tags["mlflow.parentRunId"] = above.run_id
            if known:
                run_id = known[0].info.run_id
                client.update_run(run_id, status="RUNNING")
            else:
                run_id = client.create_run(experiment_id, run_name=name or job).info.run_id
        tracker = cls(RunHandle(uri, run_id, str((Place.of(work) / "unsent").scratch() / run_id)), owner=True)
        tracker.tags(all_tags)
        tracker._outbox.adopt()
        return tracker

    @classmethod
    def resume(cls, handle: RunHandle | None) -> Tracker:
        """Write to a run that another process opened; closing this tracker leaves the run's status to its owner."""
        return cls(handle or RunHandle(), owner=False)

    @classmethod
    def off(cls) -> Tracker:
        """A tracker that writes nowhere."""
        return cls(RunHandle(), owner=False)

    def handle(self) -> RunHandle:
        """What another process needs to `resume`."""
        return self._handle

    def close(self, status: str = "FINISHED") -> None:
        """Send what is waiting; the tracker that opened the run also sends what its workers left, and ends it with `status`."""
        if self._owner:
            self._outbox.adopt()
        self._outbox.close()
        self._send_at_exit.detach()
        if self._client is not None and self._owner:
            with never_fatal("how the run ended"):
                self._client.set_terminated(self._handle.run_id, status)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close("FAILED" if issubclass(kind, Exception) else "KILLED")
        except Exception:
            log.exception("MLflow could not be told how the run ended")  # the error that ended it matters more

    # --------------------------------------------------------------------------------------------------------- writing

    def params(self, values: Mapping[str, Any]) -> None:
        """Log a configuration, nested or flat. MLflow's parameters never change: a new value of a continued run becomes
        the tag `changed/<name>`, and values longer than MLflow takes are cut there but whole in `config.json`."""
        if self._client is None:
            return
        from mlflow.entities import Param

        flat = {_fit_name(k): _text(v) for k, v in _flatten(values)}
        there = self._client.get_run(self._handle.run_id).data.params
        new = [Param(k, _cut(v, _LONGEST_PARAM)) for k, v in flat.items() if k not in there]
        for chunk in _chunks(new, _MOST_PARAMS):
            self._client.log_batch(self._handle.run_id, params=chunk)
        self.tags({f"changed/{k}": v for k, v in flat.items() if k in there and there[k] != _cut(v, _LONGEST_PARAM)})
        self.file("config.json", json.dumps(flat, indent=2, ensure_ascii=False))

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags; they may be set again."""
        if self._client is None:
            return
        self._outbox.tags({name: _cut(str(value), _LONGEST_TAG) for name, value in values.items()})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers under slashed names ("train/loss") at a step. Buffered."""
        if self._client is None:
            return
        self._outbox.metrics({_fit_name(k): float(v) for k, v in values.items()}, step)

    def audio(self, name: str, waveform: ArrayLike, rate: int, step: int = 0) -> None:
        """Keep `[T]` samples in [-1, 1] as `samples/step_…/<name>.wav`, which the UI plays."""
        if self._client is None:
            return
        from stages.audio import write_wav  # torch, which the commands import only for their work

        with self._draft(f"samples/step_{step:06d}/{_fit_name(name)}.wav") as path:
            write_wav(path, np.asarray(waveform, dtype=np.float32), rate)

    def spectrogram(self, name: str, mel: ArrayLike, step: int = 0) -> None:
        """Show a log-mel spectrogram `[F, M]` as an image with a slider over the steps."""
        if self._client is None:
            return
        from pipelines import plots  # matplotlib, which most processes never need

        picture = plots.mel_image(np.asarray(mel, dtype=np.float32), scale=4)
        self._outbox.image(picture, f"mel/{_fit_name(name)}", step)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Show a table in the UI as `<name>.json`; writing it again replaces it."""
        if self._client is None:
            return
        path = f"{_fit_name(name)}.json"
        self.file(path, json.dumps({"columns": list(columns), "data": [list(row) for row in rows]}, ensure_ascii=False))
        with never_fatal(f"that {path} is a table"):
            self._list_table(path)

    def _list_table(self, path: str) -> None:
        assert self._client is not None
        listed = json.loads(self._client.get_run(self._handle.run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
        entry = {"path": path, "type": "table"}
        if entry not in listed:
            self.tags({"mlflow.loggedArtifacts": json.dumps([*listed, entry])})

    def file(self, path: str, content: bytes | str) -> None:
        """Write an artifact file, such as a plot's PNG bytes."""
        if self._client is None:
            return
        with self._draft(path) as draft:
            draft.write_bytes(content.encode() if isinstance(content, str) else content)

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Upload a file, or a folder with all it holds, into `folder` of the run's artifacts."""
        if self._client is None:
            return
        if Path(path).is_dir():
            self._client.log_artifacts(self._handle.run_id, str(path), folder)
        else:
            self._client.log_artifact(self._handle.run_id, str(path), folder)

    @contextmanager
    def _draft(self, path: str) -> Iterator[Path]:
        """A local file that becomes the artifact `path`."""
        with self._outbox.files() as folder:
            draft = folder / path
            draft.parent.mkdir(parents=True, exist_ok=True)
            yield draft

    # -------------------------------------------------------------------------------------------------------- registry

    def register(self, bundle: str | Path | Place, name: str, alias: str = "newest", tags: Mapping[str, str] | None = None) -> str:
        """Make a bundle a version of the registered model `name` and point `alias` at it; returns the version's number.

        The same weights are registered once. A database on this machine refers to the folder where it lies; a server
        gets a copy of it among the run's artifacts, where its other readers can reach it. A bundle behind a URL is referred to.
        """
        if self._client is None:
            return ""
        client, place = self._client, Place.of(bundle)
        folder = place.local_copy()
        digest = weights_hash(folder)
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        same = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("loa.weights_sha256") == digest]
        if same:
            version = same[0]
        else:
            source = folder.as_uri() if place.local else str(place)
            if place.local and not self._handle.uri.startswith("sqlite:"):
                self.artifact(folder, "bundle")
                source = f"{client.get_run(self._handle.run_id).info.artifact_uri}/bundle"
            version_tags = {"loa.weights_sha256": digest, "loa.code_version": code_version(), **(tags or {})}
            version = client.create_model_version(name, source, run_id=self._handle.run_id, tags=version_tags)
        client.set_registered_model_alias(name, alias, version.version)
        return str(version.version)


@contextmanager
def opened_when_needed(uri: str | None = None, **run: Any) -> Iterator[Callable[[], Tracker]]:
    """A function that opens a job's run at its first call, for work that is worth more than its record.

    Importing MLflow takes seconds, and a server may be away: a run that cannot be opened or ended is warned of, once.

    Args:
        uri: see `tracking_uri`.
        run: other arguments of `Tracker.open`.
    """
    opened: list[Tracker] = []

    def tracker() -> Tracker:
        if not opened:
            try:
                opened.append(Tracker.open(uri, **run))
            except Exception as error:
                log.warning("nothing of this run is logged: %s", error)
                opened.append(Tracker.off())
        return opened[0]

    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        for each in opened:
            with never_fatal("how the run ended"):
                each.close(status)


@contextmanager
def never_fatal(what: str) -> Iterator[None]:
    """Within the block an error of MLflow's is warned of and goes no further."""
    try:
        yield
    except Exception as error:
        log.warning("MLflow did not take %s: %s", what, str(error).splitlines()[0] if str(error) else type(error).__name__)


# --------------------------------------------------------------------------------------------------------- small things


def run_key(work: Path | str | Place, job: str, variant: str = "") -> str:
    """What identifies a job's run: `<work>/<job>/<variant>`."""
    return "/".join([str(Place.of(work)), job, *([variant] if variant else [])]).replace("'", "_")


def _experiment(client: Any, name: str, uri: str) -> str:
    """The experiment's id; a new one in a database on this machine keeps its files beside the database."""
    from mlflow.exceptions import MlflowException

    known = client.get_experiment_by_name(name)
    if known is not None:
        return str(known.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:  # another job was quicker
        known = client.get_experiment_by_name(name)
        if known is None:
            raise
        return str(known.experiment_id)


@contextmanager
def reachable(uri: str) -> Iterator[None]:
    """Says which tracking store does not answer, where MLflow would show only the last layer's error."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the tracking store {uri} cannot be used ({reason}); check --tracking-uri and MLFLOW_TRACKING_URI") from error


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    value = to_dict(value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, tuple)) else str(value)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _fit_name(name: str) -> str:
    return _UNFIT_FOR_NAMES.sub("_", name)[:250]


def _chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(values), size):
        yield values[first : first + size]
