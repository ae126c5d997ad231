"""JOB: how far a project is: series of its store, and every stage running, stopped, finished or out of date."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from options import friendly, work_option
from pipelines.leases import read_holder
from pipelines.tables import aligned
from stages import STAGES
from stages.files import Place, digest, weights_hash

RUNNING, STOPPED, FINISHED, STALE, NOTHING = "running", "stopped", "finished", "out of date", "not begun"


class StageStatus(NamedTuple):
    """How far a stage is."""

    stage: str
    state: str
    steps: str  # "120 of 210", "257"
    measure: str  # the last loss, or the first held-out measure
    remark: str  # time left, or why it is not simply finished

    def row(self) -> list[str]:
        """For a table."""
        return list(self)


def stage_statuses(work: Place, runs: Path | None = None) -> Iterator[StageStatus]:
    """Every stage of a project in turn. Reads cards, progress and leases; opens no checkpoint.

    Args:
        runs: where checkpoints lie; `<work>/runs`, or this machine's cache where `work` is behind a URL.
    """
    series = _series_now(work)
    for stage in STAGES:
        run, card = (runs or (work / "runs").scratch()) / stage, _card(work / "stages" / stage)
        progress = _json(run / "progress.json")
        holder = read_holder(Place.of(run.with_name(f".{stage}.lease")))
        if holder is not None and holder.lives:
            yield StageStatus(stage, RUNNING, _steps(progress), _first(progress.get("train", {})), _left(progress))
        elif card and progress.get("step", 0) <= card["steps"]:
            changed = _changed(work, card, series)
            yield StageStatus(stage, STALE if changed else FINISHED, f"{card['steps']}", _first(card.get("validation", {})), changed)
        elif progress:
            refused = run / "refused.txt"
            why = refused.read_text(encoding="utf-8").splitlines()[0] if refused.exists() else "the same command continues it"
            yield StageStatus(stage, STOPPED, _steps(progress), _first(progress.get("train", {})), why)
        else:
            yield StageStatus(stage, NOTHING, "", "", "")


def _series_now(work: Place) -> dict[str, str]:
    """The recipes of the store's series, as `made_from` of a card has them; none where there is no store."""
    from pipelines.features.store import FeatureStore, NoStoreError

    try:
        recipes = FeatureStore.open(work / "store").recipes()
    except NoStoreError:
        return {}
    return {name: digest({k: v for k, v in recipe.items() if k != "provenance"}, 16) for name, recipe in recipes.items()}


def _changed(work: Place, card: Mapping[str, Any], series: Mapping[str, str]) -> str:
    """What a finished stage was made from that is another thing in this project now; "" for nothing."""
    before = card.get("made_from", {})
    others = [f"the series {name}" for name, known in before.get("series", {}).items() if series.get(name, known) != known]
    for name, known in before.get("inputs", {}).items():
        folder = work / "stages" / name
        if (folder / "stage.json").exists() and weights_hash(folder.local_copy()) != known:
            others.append(f"the weights of {name}")
    return f"made with other {', '.join(others)}".replace("other the ", "other ").replace(", the ", ", ") if others else ""


def series_rows(work: Place) -> list[list[str]]:
    """Series, shards there are and shall be, of the project's store; none without a store."""
    from pipelines.features.store import FeatureStore, NoStoreError

    try:
        store = FeatureStore.open(work / "store")
    except NoStoreError:
        return []
    done = {name: store.num_shards - len(store.missing_shards(name)) for name in sorted(store.recipes())}
    return [
        [name, f"{count} of {store.num_shards} shards", "" if count == store.num_shards else "unfinished"] for name, count in done.items()
    ]


def _card(folder: Place) -> dict[str, Any]:
    try:
        card: dict[str, Any] = json.loads((folder / "stage.json").read())
    except (FileNotFoundError, ValueError):
        return {}
    return card


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content


def _steps(progress: Mapping[str, Any]) -> str:
    step, share = int(progress.get("step", 0)), float(progress.get("share", 0.0))
    return f"{step} of {max(step, round(step / share))}" if share else f"{step}"


def _first(measures: Mapping[str, float]) -> str:
    name = next((name for name in measures if "grad_norm" not in name), "")
    return f"{name.removeprefix('train/')} {measures[name]:.3g}" if name else ""


def _left(progress: Mapping[str, Any]) -> str:
    share, seconds = float(progress.get("share", 0.0)), float(progress.get("seconds", 0.0))
    if not share or not seconds:
        return "begins"
    left = seconds * (1 - share) / share
    for unit, size in (("h", 3600), ("min", 60)):
        if left > 1.5 * size:
            return f"about {left / size:.1f} {unit} left"
    return f"about {left:.0f} s left"


@click.command()
@work_option
@friendly
def main(work: Place) -> None:
    """Say how far a project is: the series of its store, and what each stage is at."""
    if rows := series_rows(work):
        click.echo(aligned([["series", "", ""], *rows], left=3))
        click.echo()
    click.echo(aligned([["stage", "is", "steps", "measure", ""], *(status.row() for status in stage_statuses(work))], left=2, remarks=2))


if __name__ == "__main__":
    main()
