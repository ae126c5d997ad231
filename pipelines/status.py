"""JOB: how far a project is: series of its store, and every stage running, stopped, finished or out of date."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from friendly import friendly
from options import work_option
from pipelines.leases import read_holder
from pipelines.tables import aligned
from pipelines.training.identity import BEGUN, made_from_now, out_of_date, run_lease
from stages import STAGES
from stages.files import Place

if TYPE_CHECKING:
    from pipelines.features.store import FeatureStore

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


def stage_statuses(work: Place, runs: Place | None = None) -> Iterator[StageStatus]:
    """Every stage of a project in turn, and adapters where there are some. Reads cards, progress and leases; opens no checkpoint.

    Args:
        runs: where checkpoints lie; `<work>/runs` by default.
    """
    store, runs = _store(work), runs or work / "runs"
    for stage, folder in _released_to(work, runs):
        run, card = runs / stage, _card(folder)
        holder = read_holder(run_lease(run))
        run, phase = _current(run)
        progress = _json(run / "progress.json")
        if holder is not None and holder.lives:
            yield StageStatus(stage, RUNNING, _steps(progress), _first(progress.get("train", {})), phase + _left(progress))
        elif card and progress.get("step", 0) <= card["steps"]:
            changed, measure = _changed(work, card, store), _first(card.get("validation", {}))
            yield StageStatus(stage, STALE if changed else FINISHED, f"{card['steps']}", measure, changed or _released(card))
        elif progress or (run / BEGUN).exists():
            refused = run / "refused.txt"
            why = refused.read().decode().splitlines()[0] if refused.exists() else "the same command continues it"
            yield StageStatus(stage, STOPPED, _steps(progress), _first(progress.get("train", {})), phase + why)
        else:
            yield StageStatus(stage, NOTHING, "", "", "")


def _released_to(work: Place, runs: Place) -> Iterator[tuple[str, Place]]:
    """Stages by the names of their runs, and where each is released to; adapters where they were begun."""
    yield from ((stage, work / "stages" / stage) for stage in STAGES)
    for stage in STAGES:
        if (runs / f"{stage}-lora" / BEGUN).exists() or (work / "adapters" / stage / "stage.json").exists():
            yield f"{stage}-lora", work / "adapters" / stage


def _current(run: Place) -> tuple[Place, str]:
    """The folder of the phase that a run is in, and which one that is: "phase 1 of 2 (gigaspeech): "; "" where there is but one."""
    earlier = [name for name in run.folders() if name.startswith("phase_") and (run / name / BEGUN).exists()]
    folder = run / earlier[-1] if earlier and not (run / BEGUN).exists() else run
    number, count, corpora = _json(folder / BEGUN).get("phase") or (1, 1, "")
    return folder, f"phase {number} of {count} ({corpora}): " if count > 1 else ""


def _released(card: Mapping[str, Any]) -> str:
    """Which weights were released, where these are not the last."""
    released = card.get("released", {"step": card["steps"]})
    if released["step"] == card["steps"]:
        return ""
    return f"released: step {released['step']}, the best by {released['measure']} ({released['value']:.3g})"


def _store(work: Place) -> FeatureStore | None:
    from pipelines.features.store import FeatureStore, NoStoreError

    try:
        return FeatureStore.open(work / "store")
    except NoStoreError:
        return None


def _changed(work: Place, card: Mapping[str, Any], store: FeatureStore | None) -> str:
    """What of this project a finished stage was made from that has changed since; "" for nothing. What lies elsewhere is not looked at."""
    before = card.get("made_from", {})
    there = {name: work / "stages" / name for name in before.get("inputs", {}) if (work / "stages" / name / "stage.json").exists()}
    if store is None:
        before = before | {"series": {}, "clips": ""}
    return out_of_date({"made_from": before}, made_from_now(before.get("series", {}), there, store, there))


def series_rows(store: FeatureStore) -> list[list[str]]:
    """Series of a store, and the shards there are and shall be."""
    total = store.num_shards
    done = {name: total - len(store.missing_shards(name)) for name in sorted(store.recipes())}
    return [[name, f"{count} of {total} shards", "" if count == total else "unfinished"] for name, count in done.items()]


def _card(folder: Place) -> dict[str, Any]:
    try:
        card: dict[str, Any] = json.loads((folder / "stage.json").read())
    except (FileNotFoundError, ValueError):
        return {}
    return card


def _json(file: Place) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read())
    except (FileNotFoundError, ValueError):
        return {}
    return content


def _steps(progress: Mapping[str, Any]) -> str:
    step, share = int(progress.get("step", 0)), float(progress.get("share", 0.0))
    return f"{step} of {max(step, round(step / share))}" if share else f"{step}"


def _first(measures: Mapping[str, float]) -> str:
    named = {name.removeprefix("train/"): value for name, value in measures.items()}
    name = next((name for name in named if "/" not in name and not name.startswith("critic_")), "")
    return f"{name} {named[name]:.3g}" if name else ""


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
    if (store := _store(work)) is not None:
        click.echo(aligned([["series", "", ""], *series_rows(store)], left=3))
        click.echo()
    click.echo(aligned([["stage", "is", "steps", "measure", ""], *(status.row() for status in stage_statuses(work))], left=2, remarks=2))


if __name__ == "__main__":
    main()
