"""What a run is and what it is made from, by content: it continues with the same, and a finished one may be out of date."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import click

from pipelines.weights import card_beside
from stages.config import differences, to_dict
from stages.errors import UserError
from stages.files import Place, digest, weights_hash

if TYPE_CHECKING:
    from pipelines.features.store import FeatureStore
    from stages.variants import Variant


COMPLETE = "complete"  # comes last into `prepared/`
AT_START = "at_start.json"  # in a run's folder: what the weights that it was given measured before its first step
BEGUN = "job.json"  # in the run's folder: what the run is and what it is made from


def run_lease(run: Place) -> Place:
    """The lease of whoever trains in a run's folder: beside it, so that it outlives --fresh."""
    return run.parent / f".{run.name}.lease"


def without_recipes(variant: Variant) -> dict[str, Any]:
    return {k: v for k, v in to_dict(variant).items() if k not in ("name", "recipes", "phases", "summary")}


def check_same(run: Place, identity: Mapping[str, Any]) -> None:
    """A run folder belongs to one configuration; its recipe (steps, rates) may change between calls."""
    before, now = begun_as(run), json.loads(json.dumps(identity))
    before = {name: value for name, value in before.items() if name not in ("made_from", "epoch")}
    if before and before != now:
        raise UserError(
            f"{run} holds a run of another configuration ({differences(before, now)}); "
            "repeat the old settings to continue it, use --fresh to start over, or choose another --work"
        )


def made_from_now(
    series: Collection[str], inputs: Collection[str], store: FeatureStore | None, folders: Mapping[str, Place]
) -> dict[str, Any]:
    """What a stage that reads these series and builds on these stages is trained from, by content and not by place."""
    from pipelines.features.store import recipe_identity

    recipes = store.recipes() if store is not None else {}
    return {
        "clips": store.digest if store is not None else "",
        "series": {name: digest(recipe_identity(recipes.get(name, {})), 16) for name in series},
        "inputs": {name: weights_hash(folders[name].local_copy()) for name in inputs if name in folders},
    }


def out_of_date(card: Mapping[str, Any], made_from: Mapping[str, Any]) -> str:
    """What a finished stage was trained from that is another thing now, in words; "" for nothing."""
    before = card.get("made_from", {})
    names = {"series": "the series {}", "inputs": "the weights of {}"}
    changed = [
        names[kind].format(name) for kind in names for name, now in made_from[kind].items() if before.get(kind, {}).get(name, now) != now
    ]
    if before.get("clips", made_from["clips"]) != made_from["clips"]:
        changed.append("the clips of the store")
    return f"{', '.join(changed)} changed since" if changed else ""


def check_begun(run: Place, identity: Mapping[str, Any], made_from: Mapping[str, Any], accept_store: bool, epoch: int) -> int:
    """A run stays with what it began from, with its clips unless the user wants otherwise. Writes down what holds now.

    Args:
        epoch: clips of an epoch now.

    Returns those of the run's epochs: what it began with, so that its recipe stays as long as it was.
    """
    begun = begun_as(run).get("made_from", made_from)
    if begun != made_from and not any(name.endswith("/COMMIT") for name in run.tree()):  # nothing was learned yet that could be mixed
        (run / "prepared" / COMPLETE).remove()
        begun = made_from
    if changes := differences(begun.get("start", {}), made_from["start"]):
        raise UserError(f"{run} began with other weights ({changes}); leave --init-from out to continue it, or start over with --fresh")
    if stale := out_of_date({"made_from": begun | {"clips": made_from["clips"]}}, made_from):
        raise UserError(
            f"{stale} {run} began; put them back to continue it, or start over with --fresh (and --init-from to keep its weights)"
        )
    grown = begun["clips"] != made_from["clips"]
    if grown and not accept_store:
        raise UserError(
            f"clips were added to the store since {run} began, so that its epochs would hold others than before; "
            "continue it on the store as it is now with --accept-store, or start over with --fresh"
        )
    if grown:
        click.echo(f"{identity['stage']}: continues on the store as it is now; the order of its clips is a new one", err=True)
    epoch = begun_as(run).get("epoch", epoch)
    (run / BEGUN).write_json({**identity, "made_from": made_from, "epoch": epoch})
    return epoch


def begun_as(run: Place) -> dict[str, Any]:
    """What a run folder says of its run; nothing where there is none."""
    try:
        begun: dict[str, Any] = json.loads((run / BEGUN).read())
    except FileNotFoundError:
        return {}
    return begun


def identified(start: tuple[str, Place] | None) -> dict[str, str]:
    """A start by name and by content; of another run also how far that was."""
    if start is None:
        return {}
    card = card_beside(start[1])
    return {"from": start[0], "weights": weights_hash(start[1].local_copy())} | {k: card[k] for k in ("checkpoint",) if k in card}


def measured_at_start(run: Place) -> dict[str, Any]:
    """What the given weights of a run measured, for its card; nothing where it began with fresh ones."""
    return {"validation_at_start": json.loads((run / AT_START).read())} if (run / AT_START).exists() else {}
