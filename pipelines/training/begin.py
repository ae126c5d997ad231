"""How a training begins: its clips, what it is made from, whether it is finished already, and the job its workers get."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.tracking import Tracker
from pipelines.training.identity import check_begun, identified, out_of_date, without_recipes
from pipelines.training.start import start_of
from pipelines.training.suits import require_suitable
from pipelines.weights import card_beside
from stages.config import Recipe
from stages.errors import UserError
from stages.files import Place
from stages.licences import inherited

if TYPE_CHECKING:
    from pipelines.features.store import FeatureStore
    from pipelines.training.dataset import ClipDataset
    from pipelines.training.job import TrainJob
    from stages.base import Stage
    from stages.variants import Variant


def identity_of(job: TrainJob) -> dict[str, Any]:
    """What makes a run another run, whatever its recipe is."""
    identity = {"stage": job.stage, "variant": without_recipes(job.variant), "seed": job.seed, "turns": job.turns}
    return identity | ({"phase": job.phase} if job.phase else {}) | ({"lora": job.lora} if job.lora else {})


def begin(
    job: TrainJob,
    cls: type[Stage],
    store: FeatureStore,
    folders: Mapping[str, Place],
    now: Mapping[str, Any],
    init_from: str | None,
    before: Sequence[Place],
    accept_store: bool,
    judges: Path | None,
    tracker: Tracker | None,
) -> tuple[TrainJob, ClipDataset]:
    """All that the workers of a phase need to know, and the clips it learns from; writes down what the run is.

    Args:
        now: what it is made from (`made_from_now`).
        before: releases of the phases before it; it begins with the weights of the last.
    """
    from stages.base import read_card

    run, variant = Place.of(job.run), job.variant
    start = (f"phase {len(before)}", before[-1]) if before else start_of(cls, variant, init_from, run, folders, job.lora)
    made_from = {**now, "start": identified(start)}
    dataset = _training_clips(cls, job, store)
    epoch = check_begun(run, identity_of(job), made_from, accept_store, dataset.order(job.seed).length)
    require_suitable(cls, variant, store, dataset, folders)
    earlier = {f"phase {number}": read_card(folder, job.stage) for number, folder in enumerate(before, 1)}
    recipe = job.recipe.scheduled(epoch)
    job = replace(
        job,
        variant=replace(variant, recipes=replace(variant.recipes, **{job.stage: recipe})),
        start=start and (start[0], str(start[1])),
        card=_provenance(cls, variant, dataset, store, folders, made_from, earlier, tracker) | ({"lora": job.lora} if job.lora else {}),
        epoch=epoch,
        steps_before=sum(card["steps"] for card in earlier.values()),
        judge=_judge(cls, job, store, folders, judges),
    )
    return job, dataset


def is_done(job: TrainJob, made_from: Mapping[str, Any], release: str | None = None) -> bool:
    """Whether a phase is finished; says so where it was made from what has changed since.

    Args:
        release: "best" or "last", if the user asks for one of them: another release of a run that is still there is none.
    """
    from stages.base import read_card

    if not is_finished(output := Place.of(job.output), job.stage, job.recipe):
        return False
    card = read_card(output, job.stage)
    if (
        release
        and card.get("released", {}).get("by", release) != release
        and any(name.startswith("step_") for name in Place.of(job.run).folders())
    ):
        return False
    if stale := out_of_date(card, made_from):
        click.echo(f"{job.stage} is out of date: {stale}; --fresh trains it again", err=True)
    return True


def is_finished(output: Place, stage: str, recipe: Recipe) -> bool:
    """Whether `output` holds a release of `stage` that was trained for as long as the recipe asks."""
    from stages.base import read_card

    if not output.exists() or not (output.local or (output / "stage.json").exists()):  # half an upload is nothing
        return False
    card = read_card(output, stage)
    by_time = recipe.max_seconds is not None and card["seconds"] >= recipe.max_seconds
    gave_up = recipe.patience is not None and card.get("waited", 0) >= recipe.patience
    return bool(by_time or gave_up or card["steps"] >= recipe.scheduled(card.get("epoch", 0)).steps)


def _judge(
    cls: type[Stage], job: TrainJob, store: FeatureStore, folders: Mapping[str, Place], judges: Path | None
) -> tuple[str, str] | None:
    """What measures the distance of generated clips; None where it is not measured."""
    from pipelines.training.watch import judge_at_hand

    if not cls.generates or job.recipe.listen_epochs is None:
        return None
    found = judge_at_hand(judges, folders) if "waveform" in store.recipes() else None
    if found is None:
        why = "there is no judge: give --judges DIR with VGGish, or train the classifier before"
        click.echo(f"{job.stage}: generated clips are not compared with held-out ones, since {why}; {cls.best_by} tells the best", err=True)
    return found


def _training_clips(cls: type[Stage], job: TrainJob, store: FeatureStore) -> ClipDataset:
    """What of the store the stage learns from. Raises UserError when that is not enough for it."""
    from pipelines.training.dataset import ClipDataset

    dataset = ClipDataset(store, cls, cls.reads(job.variant), "train", job.corpora, job.turns)
    if not cls.learns_from(dataset):
        raise UserError(nothing_to_train_on(cls, job.variant, store, job.corpora))
    return dataset


def nothing_to_train_on(cls: type[Stage], variant: Variant, store: FeatureStore, corpora: Sequence[str] = ()) -> str:
    """The sentence on a store without clips for a stage: what it needs, what there is, what to do."""
    from pipelines.features.table import TEXTS

    mask = store.table.among("split", ["train"])
    if corpora:
        mask &= store.table.among("corpus", corpora)
    there = {name: int((mask & store.table.with_texts([name])).sum()) for name in TEXTS}
    if (mask & store.table.with_texts(cls.needs)).any():
        what = f"none of those in {store.root} is in the series {', '.join(cls.reads(variant))}: see what `loa preprocess` rejected"
    else:
        what = (
            f"of the {int(mask.sum())} training clips in {store.root} {there['captions']} have captions, {there['labels']} labels and "
            f"{there['transcript']} transcripts; add them to the recordings' table and ingest it into another folder"
        )
    return f"{cls.name} needs {cls.asks(variant)}: {what}" + (f", {cls.otherwise}" if cls.otherwise else "")


def _provenance(
    cls: type[Stage],
    variant: Variant,
    dataset: ClipDataset,
    store: FeatureStore,
    folders: Mapping[str, Place],
    made_from: Mapping[str, Any],
    phases: Mapping[str, Mapping[str, Any]],
    tracker: Tracker | None,
) -> dict[str, Any]:
    """What a stage is made from, for its card and for MLflow: store, clips, licences, its series, weights before it and at its start.

    Args:
        phases: cards of the phases before.
    """
    recipes = {name: recipe for name, recipe in store.recipes().items() if name in cls.reads(variant)}
    before = inherited({name: card_beside(folders[name]) for name in cls.builds_on(variant) if name in folders} | dict(phases))
    licences = {"clips": dataset.licences(), "inputs": before["clips"], "unstated": before["unstated"]}
    if tracker is not None:
        tracker.tags({"loa.store": store.root} | {f"loa.store.{name}": json.dumps(recipe) for name, recipe in recipes.items()})
        tracker.tags({"loa.licences": json.dumps(licences), "loa.made_from": json.dumps(made_from)})
    return {
        "store": store.root,
        "store_recipes": recipes,
        "clips_in_split": len(dataset),
        "licences": licences,
        "made_from": dict(made_from),
        "phases": [{"corpora": card["corpora"], "steps": card["steps"], "released": card["released"]} for card in phases.values()],
        "corpora": list(dataset.corpora),
    }
