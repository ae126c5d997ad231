"""JOB: train one stage of one variant, on Ray Train or in this process; a second call continues or finds it done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
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
from pipelines.training.begin import begin, identity_of, is_done
from pipelines.training.identity import check_same, made_from_now, run_lease
from pipelines.weights import released_folders, require_used
from stages import STAGES, require_stage
from stages.config import flat, to_dict
from stages.errors import UserError
from stages.files import Place

MOST_TURNS = 100  # of a clip in an epoch

if TYPE_CHECKING:
    from pipelines.features.store import FeatureStore
    from pipelines.training.job import TrainJob
    from pipelines.training.launch import Crew
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
    crew: Crew | None = None,
    fresh: bool = False,
    runs: str | Path | Place | None = None,
    turns: Mapping[str, float] | None = None,
    accept_store: bool = False,
    init_from: str | None = None,
    init_allow: Sequence[str] = (),
    release: str | None = None,
    judges: Path | None = None,
    lora: int = 0,
) -> Place:
    """Train `stage` of `variant` in the project folder `work`, phase after phase, and release it to `<work>/stages/<stage>`.

    Args:
        given: folders of weights that replace stages of `work`, by stage name.
        workers, reserve, crew: Ray Train's workers (`cluster.worker_group`), 0 for this process; or a crew that outlasts the stage.
        fresh: throw an earlier run of this stage away.
        runs: folder of its checkpoints; `<work>/runs` by default.
        turns: how often the clips of a corpus come in an epoch, by its name; once where nothing is said.
        init_from, init_allow: what its first weights are (`start_of`), and what may be amiss (`start_from`).
        accept_store: continue an earlier run although clips were added to the store since.
        release: "best" by the stage's measure, or "last"; by default the best, but the last of a training by the clock.
        judges: folder of public judges' weights, for the distance of generated clips.
        lora: train adapters of this rank beside the weights of `init_from`, which stay as they are; released to `<work>/adapters/<stage>`.

    Returns the folder of released weights; a run that is already finished is left as it is.

    Raises UserError when something the stage needs is missing, an earlier run was another, or another process is at it.
    """
    from pipelines.features.store import FeatureStore
    from pipelines.training.job import TrainJob
    from pipelines.training.launch import Crew
    from stages.base import stage_class

    cls, output = stage_class(stage), release_folder(work := Place.of(work), stage, lora)
    run = run_folder(work, f"{stage}-lora" if lora else stage, runs)
    require_used(given or {}, cls.builds_on(variant), stage)
    opened = FeatureStore.open(store or work / "store")
    opened.require_audio(variant.audio, variant.name)
    folders, turns = released_folders(work, given or {}), _known_corpora(turns or {}, opened)
    released, handle = {name: str(folder) for name, folder in folders.items()}, tracker.handle() if tracker else None
    whole = TrainJob(stage, variant, opened.root, run.url, released, str(output), handle, seed, precision, loader_workers)
    phases = _phases(replace(whole, turns=turns, allow=tuple(init_allow), release=release or "", lora=lora), cls, opened)
    with lease(run_lease(run), f"the run of {stage} in {run}"):
        if fresh:
            _discard(run, output)
        for phase in phases:
            check_same(Place.of(phase.run), identity_of(phase))
        now = made_from_now(cls.reads(variant), cls.builds_on(variant), opened, folders)
        if not is_done(phases[-1], now, release):
            with nullcontext(crew) if crew else Crew(workers, reserve, max_failures) as those:
                for i, phase in enumerate(phases):
                    if phase is phases[-1] or not is_done(phase, now):
                        before = [Place.of(earlier.output) for earlier in phases[:i]]
                        those.train(*begin(phase, cls, opened, folders, now, init_from, before, accept_store, judges, tracker))
        return output


def _phases(whole: TrainJob, cls: type[Stage], store: FeatureStore) -> list[TrainJob]:
    """A job for every phase of a stage. All but the last release into folders of their own, from which the next begins.

    Raises UserError when the store lacks what one of them learns from.
    """
    if whole.release == "best" and not cls.best_by:
        raise UserError(f"--release best: no measure tells the best weights of {whole.stage}, which has a critic; leave it out")
    parts = whole.variant.phases_of(whole.stage)[-1 if whole.lora else 0 :]  # adapters are for what comes last
    jobs = []
    for number, (learnt, recipe) in enumerate(parts, 1):
        last = number == len(parts)
        variant = replace(whole.variant, recipes=replace(whole.variant.recipes, **{whole.stage: recipe}))
        corpora = () if cls.any_corpus and whole.stage not in whole.variant.phases else _corpora_of(variant, store, learnt, last)
        release = whole.release or ("best" if cls.best_by and recipe.max_seconds is None else "last")
        job = replace(whole, variant=variant, corpora=corpora, release=release)
        if whole.stage in whole.variant.phases:
            job = replace(job, phase=(number, len(parts), ", ".join(learnt)))
        if not last:
            run = Place.of(whole.run) / f"phase_{number}"
            job = replace(job, run=run.url, output=str(run / "release"))
        jobs.append(job)
    return jobs


def release_folder(work: Place, stage: str, lora: int = 0) -> Place:
    """Where a stage is released to: adapters apart, since no later stage reads them."""
    return work / ("adapters" if lora else "stages") / stage


def run_folder(work: Place, stage: str, runs: str | Path | Place | None = None) -> Place:
    """Where the checkpoints of a stage lie; all of its workers must reach it (`require_shared`)."""
    return (Place.of(runs) if runs is not None else work / "runs") / stage


def _corpora_of(variant: Variant, store: FeatureStore, learnt: Sequence[str], last: bool) -> tuple[str, ...]:
    """What of the store a phase learns from: its corpora; in the last phase always the user's own recordings, too.

    Raises UserError when the store has neither.
    """
    there = store.table.values("corpus")
    used = tuple(c for c in there if c in learnt or (last and c not in PUBLISHED))
    if not used:
        raise UserError(
            f"{variant.name} trains on {', '.join(variant.corpora)}, here on {', '.join(learnt)}, and the store {store.root} holds "
            f"{', '.join(there) or 'no clips'}; choose a variant for these corpora (`loa variants`), or ingest others"
        )
    return used


def _known_corpora(turns: Mapping[str, float], store: FeatureStore) -> dict[str, float]:
    """`turns`, if they are of corpora in the store and make sense."""
    there = store.table.values("corpus")
    for corpus, weight in turns.items():
        if corpus not in there:
            raise UserError(f"--weight {corpus}={weight:g}: the store {store.root} holds no clips of {corpus!r}, but of {', '.join(there)}")
        if not 0 <= weight <= MOST_TURNS:
            raise UserError(f"--weight {corpus}={weight:g}: expected a number from 0 (never) to {MOST_TURNS} (so many times an epoch)")
    return dict(sorted(turns.items()))


def _discard(run: Place, output: Place) -> None:
    (output / "stage.json").remove()  # first: from now on it is no release
    output.remove_tree()
    run.remove_tree()


def _turns(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """CORPUS=TURNS given several times."""
    given = pairs(context, parameter, values)
    try:
        return {corpus: float(turns) for corpus, turns in given.items()}
    except ValueError:
        raise click.BadParameter(f"{' '.join(values)!r}: expected numbers, such as audiocaps=2") from None


@click.command()
@click.argument("stages", metavar="STAGE...", nargs=-1, required=True, shell_complete=lambda *a: [s for s in STAGES if s.startswith(a[2])])
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
    help="Folder or URL of checkpoints, which all nodes must reach.  [default: runs in --work]",
)
@worker_options
@click.option("--seed", default=0, show_default=True, help="Seed of weights, data order and dropout.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fast", "bf16", "fp32"]),
    default="auto",
    show_default=True,
    help="auto: the faster of bf16 and fp32, by measuring some steps, but fp32 for vae and vocoder, where bf16 is heard; fast: measured "
    "for these as well.",
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
    metavar="WEIGHTS",
    help="Begin with these weights: a released stage, a project, a run or one of its checkpoints, a bundle, a diffusers folder, a hub id; "
    "for the translator also a GPT-2, and `random` for none.  [default: none; where the paper has some, you are asked]",
)
@click.option(
    "--init-allow",
    multiple=True,
    type=click.Choice(["missing", "shape"]),
    help="What of --init-from may not fit: weights it lacks, or has in another shape, begin fresh. May be repeated.  [default: nothing]",
)
@click.option(
    "--release",
    type=click.Choice(["best", "last"]),
    help="Which weights to release: the best by the stage's measure, or the last.  [default: best; last of a training by the clock]",
)
@click.option(
    "--judges",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Public judges' weights: VGGish there measures the distance of generated clips.  [default: the project's own judge]",
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
    stages: tuple[str, ...],
    work: Place,
    variant: str,
    tiny: bool,
    settings: dict[str, str],
    released: dict[str, str],
    tracking_uri: str | None,
    workers: tuple[int, int] | None,
    reserve: Reservation,
    max_failures: int,
    seed: int,
    turns: dict[str, float],
    lora: int | None,
    fresh: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train STAGE: clap, audiomae, vae, vocoder, translator, diffusion, joint or classifier.

    The same command continues an interrupted run, and does nothing when the run is finished. Several stages are trained one after
    another by the same workers, which start once.
    """
    for stage in stages:
        require_stage(stage)
    from pipelines.training.launch import Crew
    from stages.base import read_card
    from stages.variants import resolve

    resolved = resolve(variant, tiny, settings)
    if dry_run:
        from pipelines.variants import describe

        for stage in stages:
            click.echo(describe(resolved, stage, workers[1] if workers else None))
        return
    tracking_uri = find_tracking(work, tracking_uri)  # refused before anything is read
    options |= {"seed": seed, "fresh": fresh, "turns": turns, "given": released, "lora": lora or 0}
    with Crew(workers, reserve, max_failures) as crew:
        for stage in stages:
            card = release_folder(work, stage, lora or 0) / "stage.json"
            before = card.read() if card.exists() else None
            tags = {"loa.stage": stage, "loa.variant": resolved.name}
            with Tracker.open(tracking_uri, work=work, job=f"train-{stage}", variant=resolved.name, tags=tags, fresh=fresh) as tracker:
                tracker.params({"seed": seed, **flat({"weight": turns}), **flat(to_dict(resolved))})
                folder = train_stage(stage, resolved, work, tracker=tracker, crew=crew, **options)
            if before == card.read():
                steps, where = read_card(folder, stage)["steps"], shown(folder)
                what = f"finished already, {steps} steps, in {where}; raise recipes.{stage}.steps to continue, or start over with --fresh"
            else:
                what = f"released to {shown(folder)}"
            click.echo(f"{stage}: {what}")
    if lora:
        click.echo(f'listen: loa generate "rain on a tin roof" --lora {shown(folder)}')
    else:
        click.echo(next_step(f"train {stages[-1]}", speech=resolved.phonemes is not None))


if __name__ == "__main__":
    main()
