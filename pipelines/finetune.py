"""JOB: a bundle learns from recordings of one's own: features by its own frozen networks, LoRA adapters (or all weights), a new bundle.

Every step finds out by itself whether it is done, so a second call continues where the first one stopped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from friendly import friendly
from options import (
    AS_NEEDED,
    PlaceType,
    Reservation,
    WorkerRange,
    set_option,
    shown,
    tracking_option,
    with_option,
    worker_options,
    works_on,
)
from pipelines.weights import frozen_of, variant_of
from stages.errors import UserError
from stages.files import Place

if TYPE_CHECKING:
    from pipelines.tracking import Tracker
    from stages.config import Recipe
    from stages.variants import Variant

STAGES = ("joint", "translator", "diffusion")
BATCH = 8  # clips; a few hundred recordings are an epoch of some dozen steps
FULL_RATE = 0.1  # of the stage's own learning rate, where all weights move


@dataclass(frozen=True)
class Plan:
    """What is learned, and how long.

    Attributes:
        stage: joint (words and sound), translator (words → LOA) or diffusion (LOA → sound).
        rank: of the adapters; 0 trains all weights of the stage.
        steps, minutes: it ends with the first of the two.
        settings: single settings of the variant by dotted names, which stand above all of these.
    """

    stage: str = "joint"
    rank: int = 16
    steps: int = 1000
    minutes: float | None = None
    settings: Mapping[str, str] | None = None

    def recipe(self, base: Recipe, clips: int) -> Recipe:
        """How a stage with the recipe `base` is finetuned on so many clips."""
        return replace(
            base,
            steps=self.steps,
            max_seconds=None if self.minutes is None else 60 * self.minutes,
            global_batch=max(1, min(BATCH, base.global_batch, clips)),
            learning_rate=base.learning_rate * (1.0 if self.rank else FULL_RATE),
            warmup_steps=max(1, self.steps // 20),
            decay="cosine",
            clip_norm=1.0,
            ema_decay=0.99 if base.ema_decay else None,
            validate_every=max(1, self.steps // 4),
            checkpoint_every=max(1, min(250, self.steps // 4)),
        )


class Finetuned(NamedTuple):
    """What came of it.

    Attributes:
        released: the folder of adapters, or of the stage's weights.
        bundle: the whole system with them.
        before, after: the stage's measures of held-out recordings, with the weights it began with and at the end.
    """

    released: Place
    bundle: Place
    before: dict[str, float]
    after: dict[str, float]

    def table(self) -> str:
        """Both measures of held-out recordings."""
        from pipelines.tables import aligned

        rows = [[name, f"{self.before[name]:.4f}", f"{self.after[name]:.4f}"] for name in self.after if name in self.before]
        return aligned([["held-out recordings", "before", "after"], *rows])


def finetune(
    recordings: Sequence[str | Path],
    bundle: str | Path | Place,
    work: str | Path | Place,
    plan: Plan | None = None,
    *,
    given: Mapping[str, str] | None = None,
    workers: WorkerRange = None,
    reserve: Reservation = AS_NEEDED,
    seed: int = 0,
    precision: str = "auto",
    tracker: Tracker | None = None,
) -> Finetuned:
    """Finetune `bundle` on recordings and write `<work>/adapters/<stage>` (or `<work>/stages/<stage>`) and `<work>/bundle`.

    Args:
        recordings: folders, as `loa ingest` reads them; their clips, features and runs lie in `work`.
        given: weights in place of the bundle's by stage, such as an AudioMAE, which public bundles lack.
        workers, reserve: of ingest, passes and training; 0 does all of it in this process.

    Raises:
        UserError: the bundle is none, says too little of itself, or has no AudioMAE, or a step cannot be done.
    """
    from pipelines.export import export, export_merged
    from pipelines.train import train_stage
    from stages.base import read_card
    from stages.bundle import local_bundle
    from stages.lora import Adapter

    plan, work, base = plan or Plan(), Place.of(work), local_bundle(bundle).absolute()
    if plan.stage not in STAGES:
        raise UserError(f"{plan.stage!r} cannot be finetuned like this; expected {', '.join(STAGES)}")
    if (work / "bundle").local and os.path.realpath((work / "bundle").url) == os.path.realpath(base):
        raise UserError(f"{base} is where the finetuned bundle goes; choose another folder with --work")
    variant, frozen = variant_of(base), frozen_of(base) | dict(given or {})
    variant = _with_features(recordings, variant, frozen, work, plan, workers, reserve, seed)
    inputs = {name: frozen[name] for name in _builds_on(plan.stage, variant)}
    settings: dict[str, Any] = {"workers": workers, "reserve": reserve, "seed": seed, "precision": precision, "tracker": tracker}
    released = train_stage(plan.stage, variant, work, given=inputs, init_from=str(base), lora=plan.rank, **settings)
    if plan.rank:
        whole = export_merged(base, [Adapter(str(released))], work / "bundle", force=True)
    else:
        learned = ("translator", "diffusion") if plan.stage == "joint" else (plan.stage,)
        whole = export(work, variant, given={name: folder for name, folder in frozen.items() if name not in learned}, force=True)
    card = read_card(released, plan.stage)
    return Finetuned(released, whole, card.get("validation_at_start", {}), card["validation"])


def _builds_on(stage: str, variant: Variant) -> tuple[str, ...]:
    from stages.base import stage_class

    return stage_class(stage).builds_on(variant)


def _with_features(
    recordings: Sequence[str | Path],
    variant: Variant,
    frozen: Mapping[str, str],
    work: Place,
    plan: Plan,
    workers: WorkerRange,
    reserve: Reservation,
    seed: int,
) -> Variant:
    """Ingest the recordings and make their features by the frozen networks; returns the variant with its recipe and settings."""
    from pipelines.features.store import FeatureStore
    from pipelines.ingest import ingest
    from pipelines.preprocess import run_pass
    from pipelines.weights import released_folders
    from stages.config import override

    if "audiomae" not in frozen:
        raise UserError("the bundle has no AudioMAE, which writes the LOA to learn from; name one with --with audiomae=FOLDER_OR_HUB_ID")
    report = ingest(recordings, work / "store", variant.audio, seed=seed, workers=workers, reserve=reserve)
    click.echo(report.summary())
    folders = {name: folder for name, folder in released_folders(work, frozen).items() if name in frozen}
    store = FeatureStore.open(work / "store")
    for name in ("mel", "loa", "latent", "speech" if variant.phonemes else "text"):
        made = run_pass(name, store, variant, folders, workers=workers, reserve=reserve)
        click.echo(f"{name}: {made.sentence()}")
    clips = int(store.table.among("split", ["train"]).sum())
    recipes = replace(variant.recipes, **{plan.stage: plan.recipe(getattr(variant.recipes, plan.stage), clips)})
    changed: Variant = override(replace(variant, recipes=recipes), plan.settings or {})
    return changed


@click.command()
@click.argument("recordings", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@click.option("--bundle", required=True, type=PlaceType(), metavar="DIR", help="What learns: a bundle, such as `loa import` makes.")
@click.option(
    "--work",
    type=PlaceType(),
    default="outputs/finetuned",
    show_default=True,
    envvar="LOA_WORK",
    metavar="DIR",
    help="Project folder for clips, features, runs, adapters and the finetuned bundle.",
)
@click.option("--stage", type=click.Choice(STAGES), default="joint", show_default=True, help="What of it learns; joint: words and sound.")
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Rank of the LoRA adapters.")
@click.option("--full", is_flag=True, help="Train all weights of the stage instead of adapters.")
@click.option("--steps", type=click.IntRange(min=1), default=1000, show_default=True, help=f"Steps of up to {BATCH} clips each.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Stop training earlier, by the clock.  [default: no limit]")
@with_option
@set_option
@worker_options
@click.option("--seed", default=0, show_default=True, help="Seed of clips, adapters, data order and dropout.")
@click.option(
    "--precision", type=click.Choice(["auto", "fast", "bf16", "fp32"]), default="auto", show_default=True, help="As of `loa train`."
)
@tracking_option
@friendly
def main(
    recordings: tuple[Path, ...],
    bundle: Place,
    work: Place,
    stage: str,
    rank: int,
    full: bool,
    steps: int,
    minutes: float | None,
    released: dict[str, str],
    settings: dict[str, str],
    workers: WorkerRange,
    reserve: Reservation,
    seed: int,
    precision: str,
    tracking_uri: str | None,
) -> None:
    """Finetune a bundle on the recordings in DIR: their features, LoRA adapters of T-UNet and GPT-2, and a bundle with them.

    The recordings need captions (a CSV, a JSONL or .txt files beside them), as for `loa ingest`. The same command continues
    where it was stopped.

    \b
      loa finetune my-recordings/ --bundle bundles/audioldm2 --work mine
      loa generate "rain on my roof" --bundle mine/bundle
      loa generate "rain on my roof" --lora mine/adapters/joint=0.7
    """
    from pipelines.tracking import Tracker
    from pipelines.tracking import tracking_uri as find_tracking
    from stages.bundle import read_info

    tracking_uri = find_tracking(work, tracking_uri)  # refused before any work
    variant = read_info(bundle).variant
    works_on(variant, work)
    plan = Plan(stage, 0 if full else rank, steps, minutes, settings)
    with Tracker.open(tracking_uri, work=work, job=f"finetune-{stage}", variant=variant) as tracker:
        tracker.params({"bundle": str(bundle), "stage": stage, "rank": plan.rank, "steps": steps, "seed": seed})
        done = finetune(
            recordings,
            bundle,
            work,
            plan,
            given=released,
            workers=workers,
            reserve=reserve,
            seed=seed,
            precision=precision,
            tracker=tracker,
        )
    click.echo(done.table())
    click.echo(f"{'weights' if full else 'adapters'}: {shown(done.released)}")
    click.echo(f'listen: loa generate "rain on my roof" --bundle {shown(done.bundle)}')


if __name__ == "__main__":
    main()
