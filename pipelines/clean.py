"""JOB: what of a project nothing refers to any more, with its size; removed when told to."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from friendly import friendly
from options import again, shown, work_option
from pipelines.tables import aligned
from stages.files import Place, default_cache, weights_hash

if TYPE_CHECKING:
    from pipelines.features.space import Leftover

QUIET = 24 * 3600.0  # seconds without a change after which a draft is nobody's
JUST_NOW = 120.0  # seconds; a training step may take as long as that
# `whole_folder`: .vae.k3j2h1_x, .vae.k3j2h1_x.old; `replacing`: .progress.json.123.456
DRAFTS = re.compile(r"\.(?:(?P<name>[\w-]+)\.[a-z0-9_]{8}(?P<old>\.old)?|[\w.-]+\.\d+\.\d+(?:\.\w+)?)")


def leftovers(work: Path, store: str | None = None, runs: bool = False, caches: bool = False) -> list[Leftover]:
    """Everything in a work folder that takes space and that no stage needs; what is kept all the same says why.

    Args:
        store: the feature store; that of the work folder by default.
        runs: count the checkpoints of finished stages among what may go.
        caches: count caches among it, too.
    """
    from pipelines.features.space import store_leftovers
    from pipelines.features.store import FeatureStore, NoStoreError

    cards = _cards(work)
    current = _encoders(work)
    found: list[Leftover] = []
    try:
        opened = FeatureStore.open(store or work / "store")
        training = [run.name for run in _run_folders(work) if _in_use(run)]
        busy = f"{training[0]} is being trained" if training else ""
        found += store_leftovers(opened, lambda series, recipe: _why_old(series, recipe, cards, current), busy)
    except NoStoreError:
        if store is not None:
            raise
    return [*found, *_drafts(work), *_runs(work, cards, runs), *_caches(work, caches)]


def _cards(work: Path) -> dict[str, dict[str, Any]]:
    """The cards of the stages and adapters released in a work folder, by the names of their runs."""
    found = {path.parent.name: path for path in sorted((work / "stages").glob("[!.]*/stage.json"))}
    found |= {f"{path.parent.name}-lora": path for path in sorted((work / "adapters").glob("[!.]*/stage.json"))}
    return {run: json.loads(path.read_text(encoding="utf-8")) for run, path in found.items()}


def _encoders(work: Path) -> dict[str, Path]:
    return {name: work / "stages" / name for name in ("audiomae", "vae", "clap") if (work / "stages" / name / "stage.json").is_file()}


def _why_old(series: str, recipe: Any, cards: dict[str, dict[str, Any]], current: dict[str, Path]) -> str:
    """Why nobody needs a series: made by an encoder that was replaced, and no released stage learnt from it. "" for one that is needed."""
    from pipelines.features.store import recipe_identity

    encoder = recipe.get("encoder")
    if encoder not in current:
        return ""  # no encoder: mels and waveforms; an encoder that is not of this project: it cannot be told
    if any(recipe_identity(card.get("store_recipes", {}).get(series, {})) == recipe_identity(recipe) for card in cards.values()):
        return ""
    folders = {name: current[encoder] / name for name in recipe["weights"]}
    hashes = {name: weights_hash(folder if folder.is_dir() else current[encoder]) for name, folder in folders.items()}
    return "" if hashes == recipe["weights"] else f"made with weights of {encoder} that the project no longer has; no stage learnt from it"


def _drafts(work: Path) -> Iterator[Leftover]:
    """Folders and files that were being written when their writer died, by the names that `stages.files` gives them."""
    from pipelines.features.space import Leftover

    for folder in (work, work / "stages", work / "adapters", *_run_folders(work), *sorted((work / "runs").glob("*/phase_*"))):
        for path in sorted(folder.glob(".*")) if folder.is_dir() else ():
            if (match := DRAFTS.fullmatch(path.name)) is None:
                continue  # .git and the like are nobody's draft
            size, newest = _measured(path)
            keep = "changed within a day" if time.time() - newest < QUIET else ""
            if match["old"] and not (folder / match["name"]).exists():
                keep = f"the only copy of {match['name']}: rename it"
            yield Leftover(Place.of(path), "stale draft", "it was never finished", size, keep, folder=path.is_dir())


def _run_folders(work: Path) -> list[Path]:
    return sorted(path for path in (work / "runs").glob("[!.]*") if path.is_dir())


def _in_use(run: Path) -> bool:
    """Whether somebody trains in a run folder: its lease lives, or something in it changed just now."""
    from pipelines.leases import read_holder
    from pipelines.training.identity import run_lease

    holder = read_holder(run_lease(Place.of(run)))
    return (holder is not None and holder.lives) or time.time() - _measured(run)[1] < JUST_NOW


def _runs(work: Path, cards: dict[str, dict[str, Any]], wanted: bool) -> Iterator[Leftover]:
    """Checkpoints of stages that are released: needed only to train them further."""
    from pipelines.features.space import Leftover

    for run in _run_folders(work):
        if _in_use(run):
            keep = "somebody trains it, or did a moment ago"
        elif run.name not in cards:
            keep = "not finished: `loa train` continues it"
        else:
            keep = "" if wanted else "continues its training; --runs counts it among what may go"
        yield Leftover(Place.of(run), "run", f"the checkpoints of {run.name}", _measured(run)[0], keep, folder=True)


def _caches(work: Path, wanted: bool) -> Iterator[Leftover]:
    """What is computed or fetched again when it is gone. Copies of remote files serve all projects of this machine."""
    from pipelines.features.space import Leftover

    keep = "" if wanted else "saves time; --caches counts it among what may go"
    for path, what in (
        (work / "evaluation" / "cache", "what judges heard"),
        (work / "scores" / "cache", "what judges heard"),
        (default_cache(), "copies of remote files, of all projects"),
    ):
        size, _ = _measured(path)
        if size:
            yield Leftover(Place.of(path), "cache", what, size, keep, folder=True)


def _measured(path: Path) -> tuple[int, float]:
    """Bytes and the last change of a file, or of a folder with all it holds. Hard links to elsewhere count nothing: they free nothing."""
    size, newest = 0, 0.0
    for file in (path, *path.rglob("*")) if path.is_dir() else (path,):
        try:
            stat = os.lstat(file)
        except FileNotFoundError:
            continue
        newest = max(newest, stat.st_mtime)
        if not file.is_dir() and stat.st_nlink == 1:
            size += stat.st_size
    return size, newest


@click.command()
@work_option
@click.option("--store", metavar="DIR", help="Feature store to look through.  [default: store in --work]")
@click.option("--runs", is_flag=True, help="Also the checkpoints of finished stages, which are needed to train them further.")
@click.option("--caches", is_flag=True, help="Also caches, which are filled again when needed.")
@click.option("--yes", is_flag=True, help="Remove what is listed as removable.  [default: list]")
@friendly
def main(work: Place, store: str | None, runs: bool, caches: bool, yes: bool) -> None:
    """List what takes space in a project and nothing refers to; remove it with --yes.

    What a living job holds is never touched.
    """
    from pipelines.features.spend import size_text

    folder = work.local_path("`loa clean`")
    listed = leftovers(folder, store, runs, caches)
    if not listed:
        click.echo(f"{shown(work)}: nothing to clean")
        return
    rows = [
        [item.kind, size_text(item.num_bytes), shown(item.place.url), f"kept: {item.keep}" if item.keep else item.why] for item in listed
    ]
    click.echo(aligned([["what", "size", "where", ""], *rows], remarks=2))
    going = [item for item in listed if not item.keep]
    total = size_text(sum(item.num_bytes for item in going))
    if not yes:
        click.echo(f"{len(going)} of {len(listed)} may go, {total}" + (f"; next: {again('loa clean --yes')}" if going else ""))
        return
    still = {(item.place, item.kind) for item in leftovers(folder, store, runs, caches) if not item.keep}  # a job may have begun meanwhile
    for item in going:
        if (item.place, item.kind) in still:
            item.remove()
    click.echo(f"removed {len(still)}, {total}")


if __name__ == "__main__":
    main()
