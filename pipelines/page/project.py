"""What a project folder holds, read for its report: evaluation, runs, stages, bundle, store."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.evaluation.results import Evaluation
from pipelines.features.store import FeatureStore
from pipelines.page.runs import Run, read_runs
from pipelines.tracking import tracking_uri
from stages import STAGES
from stages.audio import AudioConfig, Waveform, load_audio, log_mel
from stages.errors import UserError
from stages.files import Place


@dataclass(frozen=True)
class Project:
    """Everything a report speaks of; what the folder lacks is None or empty."""

    work: Place
    uri: str  # where its runs are
    evaluation: Evaluation | None
    runs: list[Run]
    steps: list[dict[str, Any]]  # of the demo, with their time and memory
    stages: dict[str, dict[str, Any]]  # cards of the released stages
    bundle: dict[str, Any]
    store: FeatureStore | None

    @classmethod
    def read(cls, work: str | Path | Place, uri: str | None = None) -> Project:
        """The project in the folder `work`.

        Args:
            uri: where its runs are; by default as for `loa train`.

        Raises:
            UserError: there is no such folder, or MLflow's store cannot be used.
        """
        work = Place.of(work)
        runs_at = tracking_uri(work, uri)  # refused before anything is read
        if not work.exists():
            raise UserError(f"there is no project folder {work}; run `loa demo`, or name another with --work")
        cards = {stage: card for stage in STAGES if (card := _json(work / "stages" / stage / "stage.json"))}
        try:
            store = FeatureStore.open(work / "store")
        except UserError:
            store = None  # a report of what was only evaluated here
        return cls(
            work=work,
            uri=runs_at,
            evaluation=Evaluation.read(work),
            runs=read_runs(work, uri),
            steps=_json(work / "steps.json") or [],
            stages=cards,
            bundle=_json(work / "bundle" / "loa.json") or {},
            store=store,
        )

    def audio(self) -> AudioConfig:
        """The rate and the spectrograms of the evaluated sounds. Needs an evaluation."""
        if self.store is not None:
            return self.store.audio
        assert self.evaluation is not None
        protocol = self.evaluation.protocol
        return AudioConfig(sample_rate=int(protocol["sample_rate"]), clip_seconds=float(protocol["seconds"]))

    def sound(self, row: dict[str, Any], system: str) -> Waveform | None:
        """A system's sound of an evaluated clip, or None when there is none."""
        name = row["files"].get(system)
        if name is None:
            return None
        try:
            path = Path(name) if os.path.isabs(name) else (self.work / "evaluation" / name).local_copy()
        except FileNotFoundError:
            return None
        return load_audio(path, self.audio().sample_rate) if path.is_file() else None

    def mel(self, waveform: Waveform) -> NDArray[np.float32]:
        """Its log-mel spectrogram `[F, M]`, at its own level: what is too quiet should look it."""
        mel: NDArray[np.float32] = log_mel(torch.from_numpy(waveform)[None], self.audio())[0].numpy()
        return mel


def _json(place: Place) -> Any:
    return json.loads(place.read()) if place.exists() else None
