"""Stages that learn from one corpus after the other, recipes in epochs, and the variants that use both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from tiny_store import largest_difference, make_store, run_here, small

import loa
from pipelines.status import stage_statuses
from pipelines.tracking import Tracker
from pipelines.train import train_stage
from pipelines.training.checkpoint import Checkpoints, TrainingState
from stages.base import read_card
from stages.config import Recipe, to_dict
from stages.errors import UserError
from stages.files import Place
from stages.variants import VARIANTS, Phase, Variant, resolve

SPEECH = ("gigaspeech", "ljspeech")


def phased(first: int = 1, second: int = 2, **settings: Any) -> Variant:
    """AudioMAE, the cheapest stage, in two phases of so many steps."""
    variant = small()
    recipe = replace(variant.recipes.audiomae, **{"checkpoint_every": 100, **settings})
    parts = (Phase(("gigaspeech",), replace(recipe, steps=first)), Phase(("ljspeech",), replace(recipe, steps=second)))
    return replace(variant, corpora=SPEECH, phases={"audiomae": parts})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_store(tmp_path_factory.mktemp("phases"), small(), clips=24, corpora=SPEECH).root


def test_phases_follow_each_other(store: str, tmp_path: Path) -> None:
    """The second begins with the weights of the first, learns from its own corpus, and is what is released; curves go on."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with Tracker.open(uri, work=tmp_path, job="train-audiomae", variant="tiny") as tracker:
        output = train_stage("audiomae", phased(), tmp_path, store=store, workers=0, tracker=tracker)
        run_id = tracker.handle().run_id
    card, run = read_card(output, "audiomae"), tmp_path / "runs" / "audiomae"
    first = read_card(run / "phase_1" / "release", "audiomae")
    assert (first["corpora"], first["steps"], card["corpora"], card["steps"]) == (["gigaspeech"], 1, ["ljspeech"], 2)
    assert first["clips_in_split"] == card["clips_in_split"] == 9
    assert card["made_from"]["start"]["from"] == "phase 1"
    assert [phase["corpora"] for phase in card["phases"]] == [["gigaspeech"]]
    assert sorted({metric.step for metric in MlflowClient(uri).get_metric_history(run_id, "val/reconstruction")}) == [1, 3]

    still = phased(learning_rate=1e-12)
    train_stage("audiomae", still, tmp_path / "still", store=store, workers=0, init_from=str(run / "phase_1" / "release"))
    folders = [tmp_path / "still" / "stages" / "audiomae", tmp_path / "still" / "runs" / "audiomae" / "phase_1" / "release"]
    assert all(largest_difference(folder, run / "phase_1" / "release") < 1e-6 for folder in folders)


def test_a_run_that_was_killed_in_its_second_phase_goes_on_there(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = phased(checkpoint_every=1)
    whole = train_stage("audiomae", variant, tmp_path / "whole", store=store, workers=0).path
    work = Place.of(tmp_path / "killed")
    save = Checkpoints.save

    def killed(self: Checkpoints, state: TrainingState) -> None:
        save(self, state)
        if "phase_1" not in str(self.run) and state.progress.step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", killed)
        train_stage("audiomae", variant, work, store=store, workers=0)
    (status,) = [status for status in stage_statuses(work) if status.stage == "audiomae"]
    assert status.state == "stopped" and status.remark == "phase 2 of 2 (ljspeech): the same command continues it"
    first = (tmp_path / "killed" / "runs" / "audiomae" / "phase_1" / "release" / "stage.json").stat().st_mtime_ns
    (tmp_path / "killed").rename(tmp_path / "moved")  # where things lie does not matter
    output = train_stage("audiomae", variant, tmp_path / "moved", store=store, workers=0).path
    assert largest_difference(output, whole) == 0.0
    assert (tmp_path / "moved" / "runs" / "audiomae" / "phase_1" / "release" / "stage.json").stat().st_mtime_ns == first
    before = (output / "stage.json").stat().st_mtime_ns
    train_stage("audiomae", variant, tmp_path / "moved", store=store, workers=0)
    assert (output / "stage.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="phase"):
        swapped = replace(variant, phases={"audiomae": variant.phases["audiomae"][::-1]})
        train_stage("audiomae", swapped, tmp_path / "moved", store=store, workers=0)


def test_a_store_without_the_corpora_of_a_phase_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path, small(), clips=8, passes=(), corpora=("ljspeech",))
    with pytest.raises(UserError, match="trains on gigaspeech, ljspeech, here on gigaspeech, and the store .* holds ljspeech; choose"):
        train_stage("audiomae", phased(), tmp_path, workers=0)
    assert not (tmp_path / "runs" / "audiomae").exists()


def test_own_recordings_belong_to_the_last_phase(tmp_path: Path) -> None:
    make_store(tmp_path, small(), clips=24, corpora=("gigaspeech", "mine"))
    output = train_stage("audiomae", phased(1, 1), tmp_path, workers=0)
    assert read_card(output, "audiomae")["corpora"] == ["mine"]
    assert read_card(tmp_path / "runs" / "audiomae" / "phase_1" / "release", "audiomae")["corpora"] == ["gigaspeech"]


@pytest.mark.slow
def test_the_pretrained_translator_reads_gigaspeech_first(tmp_path: Path, phonemes: str) -> None:
    variant = small("audioldm2-ljs-pretrained", steps=1, batch=2)
    store = make_store(tmp_path, variant, clips=14, corpora=SPEECH)
    folders = {stage: train_stage(stage, variant, tmp_path, workers=0) for stage in ("clap", "audiomae")}
    run_here("loa", store, variant, folders)
    run_here("speech", store, variant, folders)
    card = read_card(train_stage("translator", variant, tmp_path, workers=0), "translator")
    assert card["corpora"] == ["ljspeech"] and card["phases"][0]["corpora"] == ["gigaspeech"]
    assert card["made_from"]["start"]["from"] == "phase 1" and card["licences"]["clips"] == {"CC0": 4}


# ---------------------------------------------------------------------------------------------------- variants, settings


def test_the_pretrained_variant_keeps_its_phases() -> None:
    for tiny in (False, True):
        variant = resolve("audioldm2-ljs-pretrained", tiny)
        assert [corpora for corpora, _ in variant.phases_of("translator")] == [("gigaspeech",), ("ljspeech",)]
        assert [corpora for corpora, _ in variant.phases_of("joint")] == [("ljspeech",)]
        assert [corpora for corpora, _ in variant.phases_of("diffusion")] == [("gigaspeech", "ljspeech")]
    assert sum(recipe.max_seconds or 0 for _, recipe in variant.phases_of("translator")) == 180  # as long as in one phase


def test_settings_hold_for_all_phases_or_for_one() -> None:
    settings = {"recipes.translator.steps": "7", "phases.translator.0.recipe.steps": "9", "recipes.translator.global_batch": "4"}
    parts = resolve("audioldm2-ljs-pretrained", settings=settings).phases_of("translator")
    assert [(recipe.steps, recipe.global_batch) for _, recipe in parts] == [(9, 4), (7, 4)]
    with pytest.raises(UserError, match="unknown setting 'phases.translator.2.recipe.steps': tuple has no field '2'; nearest: 0, 1"):
        resolve("audioldm2-ljs-pretrained", settings={"phases.translator.2.recipe.steps": "1"})
    with pytest.raises(UserError, match="this is a group"):
        resolve("audioldm2-ljs-pretrained", settings={"phases.joint": "[]"})
    json.dumps(to_dict(resolve("audioldm2-ljs-pretrained")))


def test_dry_run_shows_phases() -> None:
    run = CliRunner().invoke(loa.main, ["train", "translator", "--variant", "audioldm2-ljs-pretrained", "--tiny", "--dry-run"])
    assert "translator 1/2 (gigaspeech)" in run.output and "translator 2/2 (ljspeech)" in run.output, run.output


# --------------------------------------------------------------------------------------------------------------- epochs


def test_epochs_and_steps_whichever_is_less() -> None:
    recipe = Recipe(1000, 128, 1e-4, warmup_steps=50, epochs=10)
    assert (recipe.scheduled(1280).steps, recipe.scheduled(1281).steps, recipe.scheduled(10**6).steps) == (100, 101, 1000)
    assert recipe.scheduled(1280).warmup_steps == 10 and recipe.scheduled(10**6).warmup_steps == 50
    assert recipe.scheduled(0) is recipe
    assert replace(recipe, listen_epochs=0.5).listen_every(1280) == 5 and recipe.listen_every(1280) is None
    with pytest.raises(UserError, match="epochs must be positive, got 0"):
        replace(recipe, epochs=0)


def test_an_epoch_is_that_of_the_runs_beginning(tmp_path: Path) -> None:
    """18 training clips, 1.5 epochs in batches of 4: 7 steps; a second call knows that these were all."""
    variant = small(steps=100)
    recipe = replace(variant.recipes.audiomae, epochs=1.5, checkpoint_every=100)
    variant = replace(variant, recipes=replace(variant.recipes, audiomae=recipe))
    make_store(tmp_path, variant, clips=24)
    output = train_stage("audiomae", variant, tmp_path, workers=0)
    assert read_card(output, "audiomae")["steps"] == 7 and read_card(output, "audiomae")["epoch"] == 18
    before = (output / "stage.json").read()
    train_stage("audiomae", variant, tmp_path, workers=0)
    assert (output / "stage.json").read() == before
    job = tmp_path / "runs" / "audiomae" / "job.json"
    begun = json.loads(job.read_text()) | {"epoch": 24}  # as if the run had begun on a larger store
    job.write_text(json.dumps(begun))
    output.remove_tree()
    train_stage("audiomae", variant, tmp_path, workers=0)
    assert read_card(output, "audiomae")["steps"] == 9


CLIPS = {"audioldm2-ac": 45_000, "audioldm2-ac-large": 45_000, "audioldm2-ljs": 13_100, "audioldm2-msd": 510_000}


@pytest.mark.parametrize("name", VARIANTS)
def test_no_variant_learns_its_corpora_by_heart(name: str) -> None:
    """Nothing is seen thousands of times, and what is seen more than 20 times is watched: the best is kept, patience ends it."""
    variant = resolve(name)
    sizes = {"gigaspeech": 8_300_000, "ljspeech": 13_100}
    for stage in ("translator", "diffusion", "joint"):
        for corpora, recipe in variant.phases_of(stage):
            clips = CLIPS.get(name, sum(sizes.get(corpus, 10_400_000) for corpus in corpora[:2]))
            times = recipe.scheduled(clips).steps * recipe.global_batch / clips
            assert times <= {"translator": 301, "diffusion": 601, "joint": 101}[stage]
            assert times < 20 or recipe.patience is not None, (name, stage, corpora, times)
            assert recipe.max_seconds is None and (stage == "translator") == (recipe.listen_epochs is None)
