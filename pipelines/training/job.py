"""What the workers of a training need to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.config import Recipe
from stages.errors import UserError
from stages.files import Place
from stages.variants import Variant

PRECISIONS = ("auto", "fast", "bf16", "fp32")


@dataclass(frozen=True)
class TrainJob:
    """Everything a worker needs to know; travels to it as one value."""

    stage: str
    variant: Variant
    store: str
    run: str  # folder or URL of this run: checkpoints, prepared/, progress.json
    released: Mapping[str, str]  # folder or URL of every stage whose weights are available
    output: str  # where the released weights go: a folder or URL
    tracker: Any = None  # Tracker.handle() of the run this job logs to
    seed: int = 0
    precision: str = "auto"  # one of PRECISIONS
    loader_workers: int = 0
    validation_batches: int = 4
    corpora: tuple[str, ...] = ()
    turns: Mapping[str, float] = field(default_factory=dict)  # of a corpus' clips in an epoch; one where nothing is said
    start: tuple[str, str] | None = None  # what its first weights are: as the user named it, and the folder or URL
    allow: tuple[str, ...] = ()  # what the start may lack (`stages.starting`)
    epoch: int = 0  # clips that an epoch of the recipe counts: those of the run's beginning
    phase: tuple[int, int, str] | None = None  # its number, how many there are, and its corpora; None where a stage has no phases
    steps_before: int = 0  # of earlier phases, in the same curves
    judge: tuple[str, str] | None = None  # what measures the distance of generated clips: its kind, and the folder or URL of its weights
    release: str = "last"  # which weights are released: "last", or "best" by the stage's measure
    lora: int = 0  # the rank of adapters that are trained in place of the weights; 0 for none (`stages.lora`)
    card: Mapping[str, Any] = field(default_factory=dict)  # provenance for the release

    @property
    def recipe(self) -> Recipe:
        recipe: Recipe = getattr(self.variant.recipes, self.stage)
        return recipe

    def folder(self, stage: str) -> Path:
        """Released weights of `stage`, on this machine. Raises UserError naming the command that makes them."""
        if stage == "prepared":
            return (Place.of(self.run) / "prepared").local_copy()
        if stage not in self.released:
            raise UserError(
                f"{self.stage} needs the weights of {stage}: run `loa train {stage}` first or give them with --with {stage}=FOLDER"
            )
        return Place.of(self.released[stage]).local_copy()

    def start_folder(self) -> Path | None:
        """The weights to begin with, on this machine; None for fresh ones."""
        return Place.of(self.start[1]).local_copy() if self.start else None
