"""What every trainable thing of loa has in common: the Stage contract, and released folders."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor, nn

from stages import STAGES, require_stage
from stages.errors import UserError
from stages.files import Place, whole_folder, write_json
from stages.variants import Variant

STAGE_FORMAT = 1
LAST = ("config.json", "stage.json")  # what makes a folder a release: uploads bring them last


class ClipSource(Protocol):
    """Training clips as `Stage.prepare` sees them: those that the stage wants."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def texts(self) -> Iterator[Mapping[str, Any]]:
        """`captions`, `labels` and `transcript` of every clip in turn; there may be millions."""
        ...

    def clip(self, index: int, series: Sequence[str] = ()) -> dict[str, Any]:
        """`clip_id`, `captions`, `labels` and `transcript` of clip `index`, with its arrays by member name: of `series`, or of all."""
        ...


class Stage(nn.Module):
    """One trainable unit of the system.

    A stage says what it reads, which parts are optimised and by which losses; the loop in
    `pipelines/training/loop.py` owns backward, clipping, stepping, EMA, precision, logging and saving.

    Randomness has two sources only: `example` gets a generator seeded by (seed, epoch, clip), and a batch
    carries `step_rng`, seeded by (seed, step) and equal on all workers. So a run does not depend on the
    number of workers, and a resumed run repeats the uninterrupted one.
    """

    name: ClassVar[str]
    any_corpus: ClassVar[bool] = True  # learns from whatever the store holds, not from the variant's corpora alone
    series: ClassVar[tuple[str, ...]] = ()  # feature-store series it reads
    needs: ClassVar[tuple[str, ...]] = ()  # wants clips that have one of these: captions, labels, transcript; none: all clips
    otherwise: ClassVar[str] = ""  # what to do where a store has nothing to train it on
    blocks: tuple[type[nn.Module], ...] = ()  # repeated blocks, sharded one by one before their part
    averaged: ClassVar[str] = ""  # the parameters that an average is kept of: those whose name begins so, by default all
    full_precision: ClassVar[bool] = False  # trains in float32 unless told otherwise
    usual_start: ClassVar[str] = ""  # what the paper begins with, as `--init-from` takes it; nothing for chance alone
    best_by: ClassVar[str] = ""  # the measure of `validate`, low for good, that tells its best weights; "" where none does
    generates: ClassVar[bool] = False  # makes sounds (`generate`), whose distance from held-out ones tells more
    may_lack: tuple[str, ...] = ()  # of `homes`: what a start may come without
    entries: tuple[type[nn.Module], ...] = ()  # modules inside a part that are also called alone: sharded on their own

    @classmethod
    def reads(cls, variant: Variant) -> tuple[str, ...]:
        """The feature-store series it reads for this variant."""
        return cls.series

    def reads_now(self, rng: np.random.Generator | None) -> tuple[str, ...]:
        """Which of these series one step needs, by that step's generator, before a clip is read; () for all of them.

        `losses` gets a generator in the same state, and draws first what was drawn here. None stands for validation.
        """
        return ()

    @classmethod
    def builds_on(cls, variant: Variant) -> tuple[str, ...]:
        """The earlier stages whose released weights `prepare` and `build` read for this variant."""
        return ()

    @classmethod
    def prepare(
        cls, variant: Variant, released: Callable[[str], Path], dataset: ClipSource, folder: Path, start: Path | None = None
    ) -> None:
        """Make, once and before the workers start, what `build` needs from the data (tokenizers, scales).

        The result lies in `folder` and reaches `build` as `released("prepared")`. `start` holds the weights that the stage
        will begin with, and what belongs to them.
        """

    @classmethod
    def fits_usual_start(cls, variant: Variant) -> bool:
        """Whether the variant has the sizes of `usual_start`."""
        return False

    @classmethod
    def build(cls, variant: Variant, released: Callable[[str], Path]) -> Stage:
        """A fresh stage; `released(name)` is the folder of an earlier stage's weights (or raises UserError)."""
        raise TypeError(f"{cls.__name__} does not say how it is built")

    def parts(self) -> dict[str, nn.Module]:
        """Separately optimised modules by the names under which `losses` yields."""
        raise TypeError(f"{type(self).__name__} does not name its parts")

    @classmethod
    def asks(cls, variant: Variant) -> str:
        """What it needs of a store, in words: "clips with captions or labels"."""
        return "clips"

    @classmethod
    def learns_from(cls, dataset: ClipSource) -> bool:
        """Whether these training clips, which it wants, are enough for it."""
        return len(dataset) > 0

    def example(self, clip: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        """One training example from a clip's row and arrays; every random choice is drawn from `rng`."""
        raise TypeError(f"{type(self).__name__} does not make examples")

    def losses(self, batch: dict[str, Any]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Yield (part, loss, logs) for every part that moves in this step; resumed after that part has been stepped.

        `batch` holds stacked examples, `step` (finished updates) and `step_rng`. Where `in_pieces` is true, it is one of several
        whose losses are asked for in turns, part by part: what a stage keeps from one yield to the next is then kept of all of
        them at once, so it keeps no graph and computes again what the next loss needs.
        """
        raise TypeError(f"{type(self).__name__} has no losses")

    def validate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Scalar measures of one validation batch, averaged by the loop."""
        return {}

    def listen(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Something to see or hear from one validation batch: "audio/…" [T] waveforms, "mel/…" [F, M] images."""
        return {}

    def generate(self, batch: dict[str, Any]) -> Tensor:
        """Waveforms [B, T] for the clips of a validation batch, the same ones whenever its weights are the same."""
        raise TypeError(f"{type(self).__name__} makes no sounds")

    def homes(self) -> dict[str, nn.Module]:
        """The networks it can begin with, by the names of their folders or files in what `save` writes."""
        raise TypeError(f"{type(self).__name__} does not start from given weights")

    def started(self, folder: Path) -> None:
        """Called when the weights of `folder` have been put into `homes`, for what depends on them."""

    def save(self, folder: Path) -> None:
        """Write the weights that later stages and the bundle use, as safetensors and JSON."""
        raise TypeError(f"{type(self).__name__} does not say how it is released")


# ---------------------------------------------------------------------------------------------- released folders


def release(stage: Stage, folder: str | Path | Place, card: Mapping[str, Any], save: Callable[[Stage, Path], None] | None = None) -> None:
    """Save a trained stage as `folder` with its card (`stage.json`: what it is and what made it), whole or not at all.

    `save` writes what is released of it, `Stage.save` by default.
    """
    with Place.of(folder).writing_folder(LAST) as local, whole_folder(local) as draft:
        (save or type(stage).save)(stage, draft)
        write_json(draft / "stage.json", {"format": STAGE_FORMAT, "stage": stage.name, **card})


def read_card(folder: str | Path | Place, stage: str) -> dict[str, Any]:
    """The card of a released stage.

    Raises UserError when the folder is not a release of `stage` in this format.
    """
    path = Place.of(folder) / "stage.json"
    if not path.exists():
        raise UserError(f"{folder} contains no released stage (no stage.json); run `loa train {stage}` or name another folder")
    card: dict[str, Any] = json.loads(path.read())
    if card.get("format") != STAGE_FORMAT:
        raise UserError(f"{path} has format {card.get('format')}, this version of loa reads {STAGE_FORMAT}")
    if card.get("stage") != stage:
        raise UserError(f"{folder} holds the stage {card.get('stage')!r}, expected {stage!r}")
    return card


def stage_class(name: str) -> type[Stage]:
    """The Stage called `name`. Raises UserError with the nearest name for one that does not exist."""
    require_stage(name)
    stage: type[Stage] = getattr(importlib.import_module(f"stages.{name}.training"), STAGES[name])
    return stage
