"""What is on its way to an MLflow run. A store that is away costs nothing but time: what it does not take waits, on disk in the end."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.files import write_json

MOST_METRICS, MOST_TAGS = 1000, 100  # per request, MLflow's limits
FLUSH_SECONDS = 5.0  # between two sendings of metrics
RETRY_SECONDS = 120.0  # before a store that was away is asked again: asking takes a quarter of a minute

log = logging.getLogger(__name__)


class Outbox:
    """Metrics wait in memory, artifacts in `<folder>/<process>/<time>.<kind>/`, as does what is left at the end.

    Lives apart from its tracker, so that a finalizer can hold it.

    Args:
        client: the store's MlflowClient.
        folder: where artifacts wait, of this run alone; what other processes left there is sent by `adopt`. By default, and
            where it cannot be made, a temporary one.
    """

    def __init__(self, client: Any, run_id: str, folder: Path | None = None) -> None:
        self.client, self.run_id, self.folder = client, run_id, folder
        self.waiting: list[Any] = []
        self.own: Path | None = None  # made when needed
        self.due = time.monotonic() + FLUSH_SECONDS
        self.away = False

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Queue values, and send when there are many or the last sending was long ago."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.waiting += [Metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() > self.due or (len(self.waiting) >= MOST_METRICS and not self.away):
            self.send_quietly()

    @contextmanager
    def files(self) -> Iterator[Path]:
        """A folder; what the block puts there becomes artifacts of the run, under the same paths."""
        with self._entry("files") as draft:
            yield draft
        self._send_if_there()

    def tags(self, values: Mapping[str, str]) -> None:
        """Queue tags."""
        with self._entry("tags") as draft:
            write_json(draft / "tags.json", dict(values))
        self._send_if_there()

    def image(self, picture: NDArray[np.uint8], key: str, step: int) -> None:
        """Queue a picture [H, W, 3] uint8 of MLflow's series `key`."""
        from PIL import Image

        with self._entry("image") as draft:
            Image.fromarray(picture).save(draft / "image.png")
            write_json(draft / "image.json", {"key": key, "step": step, "timestamp": int(time.time() * 1000)})
        self._send_if_there()

    def adopt(self) -> None:
        """Take over what other processes of this run, which are gone, left on disk."""
        for folder in sorted(self.folder.iterdir()) if self.folder and self.folder.is_dir() else []:
            if folder != self.own:
                for entry in sorted(folder.glob("[0-9]*.*")):
                    with suppress(FileNotFoundError):  # another was quicker
                        os.replace(entry, self._own_folder() / entry.name)
                with suppress(OSError):  # it has a draft
                    folder.rmdir()

    def send(self) -> None:
        """Send everything; what cannot be sent stays."""
        while self.waiting:
            self.client.log_batch(self.run_id, metrics=self.waiting[:MOST_METRICS])
            del self.waiting[:MOST_METRICS]
        for entry in self._entries():
            self._send_entry(entry)
            shutil.rmtree(entry)

    def send_quietly(self) -> None:
        """As `send`, but a store out of reach is only warned of, once: training is worth more than its record."""
        try:
            self.send()
            self.away = False
        except Exception as error:
            if not self.away:
                log.warning("MLflow takes nothing at the moment (%s); what is logged is kept and sent later", error)
            self.away = True
        self.due = time.monotonic() + (RETRY_SECONDS if self.away else FLUSH_SECONDS)

    def close(self) -> None:
        """Send everything; leave on disk what cannot be sent, and say where."""
        self.send_quietly()
        if self.waiting:
            with self._entry("metrics") as draft:
                write_json(draft / "metrics.json", [[m.key, m.value, m.timestamp, m.step] for m in self.waiting])
            self.waiting = []
        kept = self.own is not None and self.own.parent == self.folder
        if self._entries():
            later = "the next call of the same command sends it" if kept else "nothing sends it by itself"
            log.warning("MLflow did not take all of this run; the rest is in %s: %s", self.own, later)
        elif self.own is not None:
            for folder in (self.own, self.own.parent, self.own.parent.parent) if kept else (self.own,):
                with suppress(OSError):  # others are in it
                    folder.rmdir()

    def _send_if_there(self) -> None:
        if not self.away or time.monotonic() > self.due:
            self.send_quietly()

    def _entries(self) -> list[Path]:
        return sorted(path for path in self.own.iterdir() if not path.name.startswith(".")) if self.own and self.own.is_dir() else []

    @contextmanager
    def _entry(self, kind: str) -> Iterator[Path]:
        """A folder that is in the queue once the block has filled it."""
        draft = Path(tempfile.mkdtemp(prefix=".", dir=self._own_folder()))
        try:
            yield draft
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        os.replace(draft, draft.with_name(f"{time.time_ns():020d}.{kind}"))

    def _own_folder(self) -> Path:
        if self.own is None or not self.own.is_dir():
            try:
                if self.folder is None:
                    raise FileNotFoundError
                self.own = self.folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
                self.own.mkdir(parents=True)
            except OSError:  # a worker on another machine may not reach it
                self.own = Path(tempfile.mkdtemp(prefix="loa-unsent-"))
        return self.own

    def _send_entry(self, entry: Path) -> None:
        if entry.suffix == ".image":
            from PIL import Image

            with Image.open(entry / "image.png") as picture:
                self.client.log_image(self.run_id, picture, synchronous=True, **json.loads((entry / "image.json").read_text()))
        elif entry.suffix == ".metrics":
            from mlflow.entities import Metric

            metrics = [Metric(*values) for values in json.loads((entry / "metrics.json").read_text())]
            for first in range(0, len(metrics), MOST_METRICS):
                self.client.log_batch(self.run_id, metrics=metrics[first : first + MOST_METRICS])
        elif entry.suffix == ".tags":
            from mlflow.entities import RunTag

            tags = [RunTag(*pair) for pair in json.loads((entry / "tags.json").read_text(encoding="utf-8")).items()]
            for first in range(0, len(tags), MOST_TAGS):
                self.client.log_batch(self.run_id, tags=tags[first : first + MOST_TAGS])
        else:
            self.client.log_artifacts(self.run_id, str(entry))
