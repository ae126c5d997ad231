"""How good the weights of a run are while it goes on: what is measured when, which were the best, and when to give up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.training.checkpoint import Checkpoints, Progress, TrainingState, measure_id, step_of
from pipelines.training.dataset import ClipDataset, Examples, Share, held_out_share, validation_batches
from pipelines.training.job import TrainJob
from stages.audio import AudioConfig
from stages.errors import UserError
from stages.files import Place

if TYPE_CHECKING:
    from pipelines.evaluation.listening import Judge
    from stages.base import Stage

BATCH = 16  # clips that a worker generates at once


class JudgeAt(NamedTuple):
    """A judge by its kind, "vggish", "classifier" or "clap", and the folder or URL of its weights."""

    kind: str
    folder: str

    def load(self, audio: AudioConfig, device: torch.device) -> Judge:
        """The judge, on this machine."""
        from pipelines.evaluation.listening import ClapJudge, ClassifierJudge, as_trained, published_judges
        from stages.judges.catalogue import Listening

        folder: Path = Place.of(self.folder).local_copy()
        if self.kind == "vggish":
            (judge,) = published_judges(folder, ["vggish"], Listening(clip_seconds=min(10.0, audio.clip_seconds)), device=device)
            return judge
        return ClassifierJudge(folder, audio, device) if self.kind == "classifier" else ClapJudge(folder, as_trained(audio), device)


def judge_at_hand(judges: Path | None, folders: Mapping[str, Place]) -> JudgeAt | None:
    """The judge of a training: VGGish from a folder of public weights, else the project's own classifier, else its CLAP."""
    from stages.judges.weights import read_manifest

    if judges is not None and "vggish" in read_manifest(judges):
        return JudgeAt("vggish", str(judges))
    return next((JudgeAt(kind, str(folders[kind])) for kind in ("classifier", "clap") if kind in folders), None)


class Distance:
    """The Fréchet distance between clips that a stage generates and the held-out ones whose conditions it was given.

    FAD where the judge is VGGish. It compares the checkpoints of one run: a few hundred clips and 20 steps of sampling are too
    few for a figure that could be set beside published ones.

    Attributes:
        name: under which it is logged.
        measure: which measure it is, by number: `measure_id`.
    """

    def __init__(self, job: TrainJob, judge: JudgeAt, clips: ClipDataset, share: Share, device: torch.device) -> None:
        self.audio, self.clips, self.seed, self.share, self.device = job.variant.audio, clips, job.seed, share, device
        self.judge = judge.load(self.audio, device)
        self.name = f"frechet_{judge.kind}"
        self.measure = measure_id(self.name, self.judge.weights_hash)
        most = job.recipe.listen_clips
        self.batch = max(1, min(BATCH, most // share.world))
        self.batches = max(1, most // (self.batch * share.world))
        self._real: np.ndarray | None = None

    def of(self, stage: Stage) -> float:
        """The distance with the weights that the stage has now; infinite where what it generates is not finite. All workers call it."""
        from pipelines.evaluation.metrics import frechet_distance

        if self._real is None:
            self._real = self._embed_real()
        generated = self._embed_generated(stage)
        value = torch.tensor(torch.inf, dtype=torch.float64, device=self.device)
        if self.share.rank == 0 and np.isfinite(generated).all():
            value.fill_(frechet_distance(self._real, generated))
        if self.share.world > 1:
            dist.broadcast(value, 0)  # all must draw the same conclusions
        return float(value)

    def _embed_real(self) -> np.ndarray:
        mine = held_out_share(len(self.clips), self.share, self.batch, self.batches)
        reader = self.clips.store.reader(["waveform"])
        return self._gathered([self._embed([reader.read(int(self.clips.numbers[i]))["waveform"]]) for i in mine])

    def _embed_generated(self, stage: Stage) -> np.ndarray:
        rows = []
        for batch in validation_batches(Examples(self.clips, stage, self.seed), self.share, self.batch, self.batches):
            moved = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            waveforms = stage.generate(moved)
            embedding = self._embed(list(waveforms.nan_to_num().clamp(-1, 1).numpy()))  # judges refuse what is not finite
            rows.append(embedding if waveforms.isfinite().all() else torch.full_like(embedding, torch.nan))
        return self._gathered(rows)

    def _embed(self, waveforms: list[np.ndarray]) -> Tensor:
        """Embeddings [N, D] of clips [T], or of their windows."""
        embedding = self.judge.embed(waveforms, self.audio.sample_rate).embedding
        return embedding.float().flatten(0, -2)

    def _gathered(self, rows: list[Tensor]) -> np.ndarray:
        """The rows of all workers, who have equally many."""
        mine = torch.cat(rows).to(self.device)
        if self.share.world == 1:
            return mine.double().cpu().numpy()
        everyone = [torch.empty_like(mine) for _ in range(self.share.world)]
        dist.all_gather(everyone, mine)
        return torch.cat(everyone).double().cpu().numpy()


class Watch:
    """The measure of a run that tells its best weights: the distance of what it generates, or a loss on held-out clips.

    Attributes:
        name: of the measure; "" where none tells.
        seconds: spent on listening, which no budget counts.
    """

    def __init__(self, job: TrainJob, best_by: str, held_out: ClipDataset, share: Share, device: torch.device) -> None:
        self.job, self.recipe, self.seconds = job, job.recipe, 0.0
        every = self.recipe.listen_every(job.epoch)
        self.distance = Distance(job, JudgeAt(*job.judge), held_out, share, device) if job.judge and every else None
        self.name = self.distance.name if self.distance else best_by
        self.every = every if self.distance and every else self.recipe.validate_every
        self.measure = self.distance.measure if self.distance else measure_id(best_by)

    def due(self, step: int) -> bool:
        """Whether the measure is taken after this step."""
        return step % self.every == 0

    def listen(self, stage: Stage) -> dict[str, float]:
        """The distance of what the stage generates, by its name; nothing where no distance is measured."""
        if self.distance is None:
            return {}
        began = time.monotonic()
        value = self.distance.of(stage.eval())
        self.seconds += time.monotonic() - began
        return {self.name: value}

    def take(self, measures: Mapping[str, float], progress: Progress) -> bool:
        """Take note of what was measured after a step; returns whether these weights are to be kept as the best."""
        wanted = self.job.release == "best" or self.recipe.patience is not None
        return bool(self.name) and wanted and progress.best.take(measures[self.name], progress.step, self.measure)

    def gives_up(self, progress: Progress) -> bool:
        """Whether the patience of the recipe is spent."""
        return self.recipe.patience is not None and progress.best.waited >= self.recipe.patience

    def recall(self, progress: Progress, state: TrainingState, checkpoints: Checkpoints) -> int:
        """Put the weights that are to be released into `state`; returns the step that they are of. All workers call it.

        Raises UserError when the checkpoint with the best ones is gone.
        """
        best = progress.best
        if self.job.release == "last" or not best.step or best.step == progress.step or best.measure != self.measure:
            return progress.step
        found = [folder for folder in checkpoints.whole() if step_of(folder.name) == best.step]
        if not found:
            raise UserError(
                f"{self.job.stage}: the best weights, of step {best.step}, are gone from {self.job.run}; --release last takes the last ones"
            )
        checkpoints.resume(state, found)
        return best.step
