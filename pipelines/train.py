"""JOB: train one stage of one variant, on Ray Train or in this process; a second call continues or finds it done."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from friendly import friendly
from options import (
    AS_NEEDED,
    PlaceType,
    Reservation,
    WorkerRange,
    in_this_process,
    next_step,
    pairs,
    set_option,
    shown,
    tiny_option,
    tracking_option,
    variant_option,
    with_option,
    work_option,
    worker_options,
)
from pipelines.corpora import PUBLISHED
from pipelines.leases import lease
from pipelines.tracking import Tracker
from pipelines.tracking import tracking_uri as find_tracking
from pipelines.training.identity import (
    begun_as,
    check_begun,
    check_same,
    identified,
    made_from_now,
    out_of_date,
    run_lease,
    without_recipes,
)
from pipelines.weights import card_beside, released_folders, require_used, start_folder
from stages import STAGES, require_stage
from stages.config import Recipe, flat, to_dict
from stages.errors import UserError
from stages.files import Place
from stages.licences import inherited

MOST_TURNS = 100  # of a clip in an epoch
RANDOM = "random"  # the start that is none

if TYPE_CHECKING:
    from pipelines.features.store import FeatureStore
    from pipelines.training.dataset import ClipDataset
    from stages.base import Stage
    from stages.variants import Variant


def train_stage(
    stage: str,
    variant: Variant,
    work: str | Path | Place,
    *,
    store: str | None = None,
    given: Mapping[str, str] | None = None,
    workers: WorkerRange = None,
    reserve: Reservation = AS_NEEDED,
    tracker: Tracker | None = None,
    seed: int = 0,
    precision: str = "auto",
    loader_workers: int = 0,
    max_failures: int = 3,
    fresh: bool = False,
    runs: str | Path | Place | None = None,
    turns: Mapping[str, float] | None = None,
    accept_store: bool = False,
    init_from: str | None = None,
    init_allow: Sequence[str] = (),
    lora: int = 0,
) -> Place:
    """Train `stage` of `variant` in the project folder `work` and release it to `<work>/stages/<stage>`.

    Args:
        given: folders of weights that replace stages of `work`, by stage name.
        workers, reserve: Ray Train's workers (`cluster.worker_group`); 0 trains in this process.
        fresh: throw an earlier run of this stage away.
        runs: folder of its checkpoints, on a disk; `<work>/runs`, or this machine's cache where `work` is behind a URL.
        turns: how often the clips of a corpus come in an epoch, by its name; once where nothing is said.
        init_from, init_allow: what its first weights are (`start_folder`, `RANDOM`), and what may be amiss (`start_from`).
        accept_store: continue an earlier run although clips were added to the store since.
        lora: train adapters of this rank beside the weights of `init_from`, which stay as they are; released to `<work>/adapters/<stage>`.

    Returns the folder of released weights; a run that is already finished is left as it is.

    Raises UserError when something the stage needs is missing, an earlier run was another, or another process is at it.
    """
    from pipelines.features.store import FeatureStore
    from pipelines.training.job import TrainJob
    from pipelines.training.launch import fit
    from stages.base import stage_class

    cls, output = stage_class(stage), release_folder(work := Place.of(work), stage, lora)
    run = run_folder(work, f"{stage}-lora" if lora else stage, runs, workers)
    require_used(given or {}, cls.builds_on(variant), stage)
    opened = FeatureStore.open(store or work / "store")
    opened.require_audio(variant.audio, variant.name)
    folders = released_folders(work, given or {})
    turns = _known_corpora(turns or {}, opened)
    identity = {"stage": stage, "variant": without_recipes(variant), "seed": seed, "turns": turns} | ({"lora": lora} if lora else {})
    with lease(run_lease(run), f"the run of {stage} in {run}"):
        if fresh:
            _discard(run, output)
        check_same(run, identity)
        made_from = made_from_now(cls.reads(variant), cls.builds_on(variant), opened, folders)
        if _is_done(output, stage, variant, made_from):
            return output
        start = _start(cls, variant, init_from, begun_as(run), lora)
        made_from["start"] = identified(start)
        check_begun(run, identity, made_from, accept_store)
        dataset = _training_clips(cls, variant, opened, turns)
        card = _provenance(cls, variant, dataset, opened, folders, made_from, tracker)
        released, handle = {name: str(folder) for name, folder in folders.items()}, tracker.handle() if tracker else None
        job = TrainJob(stage, variant, opened.root, str(run), released, str(output), handle, seed, precision, loader_workers)
        job = replace(job, corpora=dataset.corpora, turns=turns, start=start and (start[0], str(start[1])), allow=tuple(init_allow))
        fit(replace(job, card=card | ({"lora": lora} if lora else {}), lora=lora), cls, dataset, workers, reserve, max_failures)
        return output


def _is_done(output: Place, stage: str, variant: Variant, made_from: Mapping[str, Any]) -> bool:
    """Whether the stage is finished; says so where it was made from what has changed since."""
    from stages.base import read_card

    if not is_finished(output, stage, getattr(variant.recipes, stage)):
        return False
    if stale := out_of_date(read_card(output, stage), made_from):
        click.echo(f"{stage} is out of date: {stale}; --fresh trains it again", err=True)
    return True


def _training_clips(cls: type[Stage], variant: Variant, store: FeatureStore, turns: Mapping[str, float]) -> ClipDataset:
    """What of the store the stage learns from. Raises UserError when that is not enough for it."""
    from pipelines.training.dataset import ClipDataset

    corpora = () if cls.any_corpus else _corpora_of(variant, store)
    dataset = ClipDataset(store, cls, cls.reads(variant), "train", corpora, turns)
    if not cls.learns_from(dataset):
        raise UserError(nothing_to_train_on(cls, variant, store, corpora))
    return dataset


def release_folder(work: Place, stage: str, lora: int = 0) -> Place:
    """Where a stage is released to: adapters apart, since no later stage reads them."""
    return work / ("adapters" if lora else "stages") / stage


def run_folder(work: Place, stage: str, runs: str | Path | Place | None = None, workers: WorkerRange = None) -> Path:
    """Where the checkpoints of a stage lie: on a disk that all of its workers reach.

    Raises UserError when there is no such disk: checkpoints are not written to an object store.
    """
    if runs is None and not work.local and not in_this_process(workers) and os.environ.get("RAY_ADDRESS"):
        raise UserError(
            f"checkpoints of a training are not written to {work}, and the workers of a cluster need them in one place; "
            "name a folder that all nodes share with --runs, or train on one machine, without RAY_ADDRESS"
        )
    folder = Place.of(runs) if runs is not None else work / "runs"
    if runs is not None and not folder.local:
        raise UserError(f"--runs {folder}: checkpoints are written to a disk; name a folder that all nodes share")
    return folder.scratch() / stage


def _provenance(
    cls: type[Stage],
    variant: Variant,
    dataset: ClipDataset,
    store: FeatureStore,
    folders: Mapping[str, Place],
    made_from: Mapping[str, Any],
    tracker: Tracker | None,
) -> dict[str, Any]:
    """What a stage is made from, for its card and for MLflow: store, clips, licences, its series, weights before it and at its start."""
    recipes = {name: recipe for name, recipe in store.recipes().items() if name in cls.reads(variant)}
    before = inherited({name: card_beside(folders[name]) for name in cls.builds_on(variant) if name in folders})
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
    }


def _corpora_of(variant: Variant, store: FeatureStore) -> tuple[str, ...]:
    """What of the store the variant trains on: its corpora, and always the user's own recordings.

    Raises UserError when the store has neither.
    """
    there = store.table.values("corpus")
    used = tuple(c for c in there if c in variant.corpora or c not in PUBLISHED)
    if not used:
        raise UserError(
            f"{variant.name} trains on {', '.join(variant.corpora)}, and the store {store.root} holds {', '.join(there) or 'no clips'}; "
            "choose a variant for these corpora (`loa variants`), or ingest others"
        )
    return used


def _start(cls: type[Stage], variant: Variant, init_from: str | None, begun: Mapping[str, Any], lora: int = 0) -> tuple[str, Place] | None:
    """What the first weights of a run are, as the user named it, and the folder; of a run that has begun, what it began with.

    Raises UserError where the paper, or adapters, begin with given weights and nothing is said.
    """
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
    return None if source in ("", RANDOM) else (source, start_folder(cls.name, source))


def _known_corpora(turns: Mapping[str, float], store: FeatureStore) -> dict[str, float]:
    """`turns`, if they are of corpora in the store and make sense."""
    there = store.table.values("corpus")
    for corpus, weight in turns.items():
        if corpus not in there:
            raise UserError(f"--weight {corpus}={weight:g}: the store {store.root} holds no clips of {corpus!r}, but of {', '.join(there)}")
        if not 0 <= weight <= MOST_TURNS:
            raise UserError(f"--weight {corpus}={weight:g}: expected a number from 0 (never) to {MOST_TURNS} (so many times an epoch)")
    return dict(sorted(turns.items()))


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


def is_finished(output: Place, stage: str, recipe: Recipe) -> bool:
    """Whether `output` holds a release of `stage` that was trained for as long as the recipe asks."""
    from stages.base import read_card

    if not output.exists() or not (output.local or (output / "stage.json").exists()):  # half an upload is nothing
        return False
    card = read_card(output, stage)
    return bool(card["steps"] >= recipe.steps or (recipe.max_seconds is not None and card["seconds"] >= recipe.max_seconds))


def _discard(run: Path, output: Place) -> None:
    (output / "stage.json").remove()  # first: from now on it is no release
    output.remove_tree()
    Place.of(run).remove_tree()


def _turns(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """CORPUS=TURNS given several times."""
    given = pairs(context, parameter, values)
    try:
        return {corpus: float(turns) for corpus, turns in given.items()}
    except ValueError:
        raise click.BadParameter(f"{' '.join(values)!r}: expected numbers, such as audiocaps=2") from None


@click.command()
@click.argument("stage", metavar="STAGE", shell_complete=lambda *a: [s for s in STAGES if s.startswith(a[2])])
@work_option
@variant_option
@tiny_option
@set_option
@with_option
@tracking_option
@click.option("--store", metavar="DIR", help="Feature store to read.  [default: store in --work]")
@click.option(
    "--runs",
    type=PlaceType(),
    metavar="DIR",
    help="Disk folder of checkpoints.  [default: runs in --work, or a cache beside a URL]",
)
@worker_options
@click.option("--seed", default=0, show_default=True, help="Seed of weights, data order and dropout.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fast", "bf16", "fp32"]),
    default="auto",
    show_default=True,
    help="auto: bf16 where the device is fast at it, but fp32 for vae and vocoder, where bf16 is heard; fast: for these as well.",
)
@click.option(
    "--loader-workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Processes per worker that load clips; 0 loads in the worker.",
)
@click.option(
    "--max-failures",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="How often a training is restarted after a worker died.",
)
@click.option(
    "--weight",
    "turns",
    multiple=True,
    callback=_turns,
    metavar="CORPUS=TURNS",
    help="How often an epoch shows the clips of a corpus: 2, 0.5, or 0 for never. May be repeated.  [default: once]",
)
@click.option(
    "--init-from",
    metavar="FOLDER",
    help="Begin with these weights: a released stage, a bundle, a diffusers folder, a hub id; for the translator also a GPT-2, and "
    "`random` for none.  [default: none; where the paper has some, you are asked]",
)
@click.option(
    "--init-allow",
    multiple=True,
    type=click.Choice(["missing", "shape"]),
    help="What of --init-from may not fit: weights it lacks, or has in another shape, begin fresh. May be repeated.  [default: nothing]",
)
@click.option(
    "--lora",
    type=click.IntRange(min=1),
    metavar="RANK",
    help="Train adapters of this rank beside the weights of --init-from: translator, diffusion, joint.  [default: train the weights]",
)
@click.option("--accept-store", is_flag=True, help="Continue a run although clips were added to the store since it began.")
@click.option("--fresh", is_flag=True, help="Delete an earlier run of this stage and start over.")
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration, sizes and estimates, without training.")
@friendly
def main(
    stage: str,
    work: Place,
    variant: str,
    tiny: bool,
    settings: dict[str, str],
    released: dict[str, str],
    tracking_uri: str | None,
    store: str | None,
    runs: Place | None,
    workers: tuple[int, int] | None,
    seed: int,
    turns: dict[str, float],
    lora: int | None,
    fresh: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train STAGE: clap, audiomae, vae, vocoder, translator, diffusion, joint or classifier.

    The same command continues an interrupted run, and does nothing when the run is finished.
    """
    require_stage(stage)
    from stages.base import read_card
    from stages.variants import resolve

    resolved = resolve(variant, tiny, settings)
    if dry_run:
        from pipelines.variants import describe

        click.echo(describe(resolved, stage, workers[1] if workers else None))
        return
    tracking_uri = find_tracking(work, tracking_uri)  # refused before anything is read
    run_folder(work, stage, runs, workers)
    before = not fresh and is_finished(release_folder(work, stage, lora or 0), stage, getattr(resolved.recipes, stage))
    tags = {"loa.stage": stage, "loa.variant": resolved.name}
    with Tracker.open(tracking_uri, work=work, job=f"train-{stage}", variant=resolved.name, tags=tags, fresh=fresh) as tracker:
        tracker.params({"seed": seed, **flat({"weight": turns}), **flat(to_dict(resolved))})
        folder = train_stage(
            stage,
            resolved,
            work,
            store=store,
            given=released,
            workers=workers,
            tracker=tracker,
            seed=seed,
            fresh=fresh,
            runs=runs,
            turns=turns,
            lora=lora or 0,
            **options,
        )
    if before:
        steps, where = read_card(folder, stage)["steps"], shown(folder)
        click.echo(
            f"{stage}: finished already, {steps} steps, in {where}; raise recipes.{stage}.steps to continue, or start over with --fresh"
        )
    else:
        click.echo(f"{stage}: released to {shown(folder)}")
    if lora:
        click.echo(f'listen: loa generate "rain on a tin roof" --lora {shown(folder)}')
    else:
        click.echo(next_step(f"train {stage}", speech=resolved.phonemes is not None))


if __name__ == "__main__":
    main()
