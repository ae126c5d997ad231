"""What a training begins with: nothing learned, given weights, or what another run has come to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipelines.training.identity import BEGUN, begun_as
from pipelines.weights import card_beside, start_folder
from stages.config import from_dict
from stages.errors import UserError
from stages.files import Place

if TYPE_CHECKING:
    from stages.base import Stage
    from stages.variants import Variant

RANDOM = "random"  # the start that is none
KEPT = "start"  # in a run's folder: the weights of another run that it began with


def start_of(
    cls: type[Stage], variant: Variant, init_from: str | None, run: Place, folders: Mapping[str, Place], lora: int = 0
) -> tuple[str, Place] | None:
    """What the first weights of a run are, as the user named it, and the folder; of a run that has begun, what it began with.

    Args:
        run: its folder.
        folders: released weights of other stages.
        lora: the rank of adapters, which need weights to adapt.

    Raises UserError where the paper, or adapters, begin with given weights and nothing is said.
    """
    begun = begun_as(run)
    source = init_from or begun.get("made_from", {}).get("start", {}).get("from", "")
    if lora and source in ("", RANDOM):
        raise UserError(
            f"--lora {lora}: adapters need the weights that they adapt; name a bundle or a released {cls.name} with --init-from"
        )
    if not source and not begun and (usual := cls.usual_start):
        if cls.fits_usual_start(variant):
            raise UserError(
                f"{cls.name} of {variant.name} begins with the weights of {usual}, as in the paper: give --init-from {usual}, a folder of "
                f"it, or an earlier {cls.name} to train on; --init-from {RANDOM} begins with nothing learned"
            )
        click.echo(f"{cls.name}: begins with random weights, since those of {usual} have other sizes", err=True)
    if source in ("", RANDOM):
        return None
    kept = run / KEPT
    if any(name.startswith("step_") for name in run.folders()) and card_beside(kept).get("source") == source:
        return source, kept  # the other run may have gone on, or away
    released = _named(source) / "stages" / cls.name
    if (released / "stage.json").exists():  # a project
        return source, start_folder(cls.name, str(released))
    if (checkpoint := _checkpoint(cls.name, source)) is not None:
        _take(cls, variant, source, checkpoint, folders, kept)
        return source, kept
    return source, start_folder(cls.name, source)


def _take(cls: type[Stage], variant: Variant, source: str, checkpoint: Place, folders: Mapping[str, Place], kept: Place) -> None:
    """Copy the weights of a checkpoint to the folder `kept`, as a release."""
    from pipelines.training.checkpoint import read_weights, step_of
    from stages.base import release

    theirs = begun_as(checkpoint.parent)
    if theirs.get("stage") != cls.name:
        raise UserError(f"--init-from {source} is a run of {theirs.get('stage', 'an unknown stage')}; expected one of {cls.name}")
    if (theirs["variant"]["phonemes"] is None) != (variant.phonemes is None):
        raise UserError(
            f"--init-from {source}: one of that run and {variant.name} speaks, the other does not; choose a run of the same kind"
        )

    above = checkpoint.parent.parent.parent
    beside = [folder / "stages" for folder in (above, above.parent)]  # the project of that run, where it is still together

    def released(name: str) -> Path:
        if name == "prepared":
            return (checkpoint.parent / "prepared").local_copy()
        if there := [stages / name for stages in beside if (stages / name / "stage.json").exists()]:
            return there[0].local_copy()
        if name not in folders:
            raise UserError(
                f"--init-from {source}: to read that run, the weights of {name} are needed; give them with --with {name}=FOLDER"
            )
        return folders[name].local_copy()

    stage = cls.build(from_dict(variant, theirs["variant"]), released)
    read_weights(checkpoint, stage.parts())
    card = {"source": source, "checkpoint": checkpoint.name, "steps": step_of(checkpoint.name), "run": str(checkpoint.parent)}
    release(stage.eval(), kept, card)


def _checkpoint(stage: str, source: str) -> Place | None:
    """The newest whole checkpoint of the run that `source` names: a run's folder, one of its checkpoints, or a project with such a run.

    Raises UserError when it names a run that has none.
    """
    from pipelines.training.checkpoint import COMMIT, whole_checkpoints

    folder = _named(source)
    if (folder / COMMIT).exists() or folder.name.startswith("step_"):
        found = [each for each in whole_checkpoints(folder.parent) if each.name == folder.name]
    elif (folder / "runs" / stage / BEGUN).exists():
        found = whole_checkpoints(folder / "runs" / stage)
    elif (folder / BEGUN).exists():
        found = whole_checkpoints(folder)
    else:
        return None
    if not found:
        raise UserError(f"--init-from {source}: there is no whole checkpoint; train that run further, or name another")
    return found[0]


def _named(source: str) -> Place:
    return Place.of(source if "://" in source else Path(source).expanduser())
