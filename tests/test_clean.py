"""`loa clean` lists what nothing refers to, and removes that alone."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_store import make_store, run_here, small

from pipelines.clean import leftovers, main
from pipelines.features.rates import random_weights
from pipelines.features.store import FeatureStore
from pipelines.train import train_stage
from pipelines.training.checkpoint import Checkpoints, TrainingState
from pipelines.training.identity import run_lease
from stages.config import to_dict
from stages.files import Place, write_json


def aged(path: Path, days: float = 2) -> Path:
    """`path` with all it holds, as if nobody had touched it for days."""
    then = time.time() - days * 86_400
    for file in (*(path.rglob("*") if path.is_dir() else ()), path):
        os.utime(file, (then, then))
    return path


def release(work: Path, stage: str, seed: int = 0, **card: object) -> Path:
    """A stage of random weights with a card."""
    import torch

    torch.manual_seed(seed)
    variant = small()
    folder = random_weights(stage, variant, work / "made" / str(seed))
    (work / "stages").mkdir(exist_ok=True)
    target = work / "stages" / stage
    if target.exists():
        import shutil

        shutil.rmtree(target)
    folder.rename(target)
    write_json(target / "stage.json", {"format": 1, "stage": stage, "variant": variant.name, "config": to_dict(variant), **card})
    return target


def listed(work: Path, **options: bool) -> dict[str, str]:
    """Relative path of everything listed, with why it is kept."""
    return {os.path.relpath(item.place.url, work): item.keep for item in leftovers(work, **options)}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOA_CACHE", str(tmp_path / "cache"))
    make_store(tmp_path, small(), clips=6, shard_size=3)
    return tmp_path


def plant(work: Path) -> dict[str, Path]:
    """One of everything that nothing refers to."""
    planted = {
        "orphan": work / "store" / "mel" / "000000-0123456789ab.tar",
        "draft": work / "store" / "mel" / "000001.tar.draft-0123456789ab-01234567",
        "table": work / "store" / "clips" / "000000-0123456789ab.arrow",
        "stage": work / "stages" / ".vae.abc_1234",
        "file": work / ".rates.json.123.456",
    }
    for name, path in planted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "stage":
            path.mkdir()
            (path / "half.safetensors").write_bytes(bytes(100))
        else:
            path.write_bytes(bytes(10))
        aged(path)
    return planted


def test_what_nothing_refers_to_goes_and_nothing_else(work: Path) -> None:
    assert listed(work) == {}
    planted = plant(work)
    for name in (".git", ".venv", ".env"):
        aged_folder = work / name
        aged_folder.mkdir()
        (aged_folder / "x").write_bytes(bytes(5))
        aged(aged_folder)
    before = {path.relative_to(work) for path in work.rglob("*") if path.is_file()}
    assert listed(work) == {os.path.relpath(path, work): "" for path in planted.values()}

    shown = CliRunner().invoke(main, ["--work", str(work)])
    assert shown.exit_code == 0 and "5 of 5 may go, 140 B" in shown.output, shown.output
    assert {path.relative_to(work) for path in work.rglob("*") if path.is_file()} == before  # only listed

    done = CliRunner().invoke(main, ["--work", str(work), "--yes"])
    assert done.exit_code == 0, done.output
    gone = before - {path.relative_to(work) for path in work.rglob("*") if path.is_file()}
    assert gone == {(p / "half.safetensors" if n == "stage" else p).relative_to(work) for n, p in planted.items()}
    store = FeatureStore.open(work / "store")
    assert store.missing_shards("mel") == [] and store.verify("mel") == []
    assert "nothing to clean" in CliRunner().invoke(main, ["--work", str(work)]).output


def test_what_a_living_job_holds_is_kept(work: Path) -> None:
    planted = plant(work)
    with FeatureStore.open(work / "store").working("a pass"):
        kept = listed(work)
        assert "living job" in kept["store/mel/000000-0123456789ab.tar"]
        CliRunner().invoke(main, ["--work", str(work), "--yes"])
        assert planted["orphan"].exists() and planted["draft"].exists() and planted["table"].exists()
    assert listed(work)["store/mel/000000-0123456789ab.tar"] == ""


def test_young_objects_are_kept(work: Path) -> None:
    """A shard lies there before its ledger row does."""
    path = plant(work)["orphan"]
    os.utime(path)
    assert "within the hour" in listed(work)["store/mel/000000-0123456789ab.tar"]


def test_a_series_is_old_when_its_encoder_was_replaced_and_no_stage_learnt_from_it(work: Path) -> None:
    variant, store = small(), FeatureStore.open(work / "store")
    vae = release(work, "vae", seed=1)
    run_here("latent", store, variant, {"vae": vae})
    assert "store/latent" not in listed(work)  # made by the encoder that is there
    recipe = store.recipes()["latent"]
    release(work, "vae", seed=2)
    assert listed(work)["store/latent"] == ""
    write_json(work / "stages" / "diffusion" / "stage.json", {"format": 1, "stage": "diffusion", "store_recipes": {"latent": recipe}})
    assert "store/latent" not in listed(work)  # the T-UNet learnt from it
    write_json(work / "stages" / "diffusion" / "stage.json", {"format": 1, "stage": "diffusion", "store_recipes": {}})
    done = CliRunner().invoke(main, ["--work", str(work), "--yes"])
    assert done.exit_code == 0 and not (work / "store" / "latent").exists(), done.output
    assert sorted(FeatureStore.open(work / "store").recipes()) == ["mel", "waveform"]


def test_runs_and_caches_go_only_when_asked_for(work: Path) -> None:
    for path in ("runs/vae/step_00000004/x", "runs/vocoder/step_00000002/x", "evaluation/cache/clap/x.npz", "cache/copy/x"):
        (work / path).parent.mkdir(parents=True)
        (work / path).write_bytes(bytes(1000))
    write_json(work / "stages" / "vae" / "stage.json", {"format": 1, "stage": "vae"})
    assert "a moment ago" in listed(work, runs=True)["runs/vae"]
    aged(work / "runs")
    kept = listed(work)
    assert "--runs" in kept["runs/vae"] and "loa train" in kept["runs/vocoder"]
    assert "--caches" in kept["evaluation/cache"] and "--caches" in kept["cache"]
    assert {path for path, keep in listed(work, runs=True, caches=True).items() if not keep} == {"runs/vae", "evaluation/cache", "cache"}


def test_drafts_of_a_phase_are_found(work: Path) -> None:
    draft = work / "runs" / "translator" / "phase_1" / ".release.ab12cd34"
    draft.mkdir(parents=True)
    (draft / "x").write_bytes(bytes(3))
    aged(work / "runs")
    assert listed(work)["runs/translator/phase_1/.release.ab12cd34"] == ""


def test_the_only_copy_of_a_folder_is_kept(work: Path) -> None:
    """`whole_folder` was killed between its two renames."""
    old = work / "stages" / ".vae.abc_1234.old"
    old.mkdir(parents=True)
    (old / "x").write_bytes(bytes(3))
    aged(old)
    assert "only copy of vae" in listed(work)["stages/.vae.abc_1234.old"]
    (work / "stages" / "vae").mkdir()
    assert listed(work)["stages/.vae.abc_1234.old"] == ""


def test_a_lease_of_another_host_that_beats_guards_a_run(work: Path) -> None:
    from pipelines.leases import Holder

    run = work / "runs" / "vae"
    run.mkdir(parents=True)
    write_json(work / "stages" / "vae" / "stage.json", {"format": 1, "stage": "vae"})
    holder = json.loads(Holder.here("loa train vae").to_json()) | {"machine": "another", "beat": time.time()}
    run_lease(Place.of(run)).write_json(holder)
    aged(run)
    assert "somebody trains it" in listed(work, runs=True)["runs/vae"]


def test_checkpoints_of_a_training_that_says_nothing_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished stage that is trained further: seen from within, at its first checkpoint, its files as old as after a long validation."""
    variant = small(steps=2)
    make_store(tmp_path, variant, clips=12)
    train_stage("audiomae", variant, tmp_path, workers=0)
    save, seen = Checkpoints.save, []

    def looked(self: Checkpoints, state: TrainingState) -> None:
        aged(tmp_path / "runs" / "audiomae")
        seen.append(listed(tmp_path, runs=True)["runs/audiomae"])
        save(self, state)

    monkeypatch.setattr(Checkpoints, "save", looked)
    recipe = replace(variant.recipes.audiomae, steps=4)
    train_stage("audiomae", replace(variant, recipes=replace(variant.recipes, audiomae=recipe)), tmp_path, workers=0)
    assert seen and all("somebody trains it" in keep for keep in seen)
