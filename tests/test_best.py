"""Which weights of a run are its best, which checkpoints stay, when a training gives up, and how generated clips are measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from tiny_store import largest_difference, make_store, run_here, small
from torch import Tensor, nn

from pipelines.features.store import FeatureStore
from pipelines.status import stage_statuses
from pipelines.tracking import Tracker
from pipelines.train import train_stage
from pipelines.training import loop, watch
from pipelines.training.checkpoint import Best, Checkpoints, TrainingState, superseded
from pipelines.training.dataset import ClipDataset, Share, held_out_share
from pipelines.training.job import TrainJob
from pipelines.training.watch import Distance, JudgeAt, judge_at_hand
from stages.base import read_card, stage_class
from stages.clap.model import train_tokenizers
from stages.errors import UserError
from stages.files import Place
from stages.variants import Variant

SERIES = [5.0, 3.0, 1.0, 2.0, 4.0, 1.5, 3.0, 3.0]  # the best is measured after the third step


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_store(tmp_path_factory.mktemp("best"), small(), clips=16).root


def variant_of(steps: int, **settings: Any) -> Variant:
    variant = small()
    base = {"steps": steps, "validate_every": 1, "checkpoint_every": 100, "decay": "constant"}
    return replace(variant, recipes=replace(variant.recipes, audiomae=replace(variant.recipes.audiomae, **(base | settings))))


@pytest.fixture
def train(store: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A training of AudioMAE whose measures are `SERIES`."""

    def measured(self: loop._Run, *_: object) -> dict[str, float]:
        return {"reconstruction": SERIES[self.state.progress.step - 1]}

    monkeypatch.setattr(loop._Run, "_validate", measured)

    def run(folder: Path, steps: int, release: str | None = None, **settings: Any) -> Path:
        return train_stage("audiomae", variant_of(steps, **settings), folder, store=store, workers=0, release=release).path

    return run


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "runs" / "audiomae").glob("step_*"))


# ------------------------------------------------------------------------------------------------------ the best weights


def test_the_best_weights_are_released(train: Callable[..., Path], tmp_path: Path) -> None:
    best = train(tmp_path / "a", 6)
    assert largest_difference(best, train(tmp_path / "three", 3, "last")) == 0.0
    card = read_card(best, "audiomae")
    assert card["released"] == {"by": "best", "step": 3, "measure": "reconstruction", "value": 1.0}
    assert card["steps"] == 6 and card["validation"] == {"reconstruction": 1.0}
    (status,) = [status for status in stage_statuses(Place.of(tmp_path / "a")) if status.stage == "audiomae"]
    assert status.remark == "released: step 3, the best by reconstruction (1)"
    assert largest_difference(train(tmp_path / "six", 6, "last"), best) > 0
    again = train(tmp_path / "a", 6, "last")  # another release of the same run: nothing is trained
    assert read_card(again, "audiomae")["released"]["step"] == 6 and read_card(again, "audiomae")["clips"] == 24
    assert largest_difference(again, tmp_path / "six" / "stages" / "audiomae") == 0.0


def test_by_the_clock_the_last_weights_are_released(train: Callable[..., Path], tmp_path: Path) -> None:
    """Their schedule is brought to its end in time, and nothing is written on the way."""
    card = read_card(train(tmp_path, 6, max_seconds=600.0), "audiomae")
    assert card["released"]["by"] == "last" and card["released"]["step"] == 6 and steps_in(tmp_path) == [6]


def test_patience_ends_a_training(train: Callable[..., Path], tmp_path: Path) -> None:
    card = read_card(train(tmp_path, 8, patience=2), "audiomae")
    assert card["steps"] == 5 and card["released"]["step"] == 3 and card["waited"] == 2
    before = (tmp_path / "stages" / "audiomae" / "stage.json").read_bytes()
    train(tmp_path, 8, patience=2)  # finished
    assert (tmp_path / "stages" / "audiomae" / "stage.json").read_bytes() == before
    assert read_card(train(tmp_path, 8, patience=3), "audiomae")["steps"] == 6  # more of it continues


def test_a_killed_run_knows_its_best_and_how_long_it_waited(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"patience": 2, "checkpoint_every": 1}
    whole = train(tmp_path / "whole", 8, **settings)
    save = Checkpoints.save

    def killed(self: Checkpoints, state: TrainingState) -> None:
        save(self, state)
        if state.progress.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", killed)
        train(tmp_path / "killed", 8, **settings)
    resumed = train(tmp_path / "killed", 8, **settings)
    cards = [read_card(folder, "audiomae") for folder in (whole, resumed)]
    assert cards[0]["released"] == cards[1]["released"] and cards[0]["steps"] == cards[1]["steps"] == 5
    assert largest_difference(whole, resumed) == 0.0


def test_checkpoints_from_before_are_continued(train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that knows nothing of a best one."""
    tensors = TrainingState.tensors
    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "tensors", lambda self: {k: v for k, v in tensors(self).items() if k != "best"})
        train(tmp_path, 2, "last")
    assert read_card(train(tmp_path, 4), "audiomae")["released"]["step"] == 3


def test_the_best_checkpoint_stays(train: Callable[..., Path], tmp_path: Path) -> None:
    train(tmp_path, 8, checkpoint_every=1, keep_every=4)
    assert steps_in(tmp_path) == [3, 4, 7, 8]


def test_a_best_checkpoint_that_is_gone_is_told(train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoints, "_let_go", lambda self, newest, best: (self.run / "step_00000003").remove_tree())
    with pytest.raises(UserError, match="the best weights, of step 3, are gone from .*; --release last takes the last ones"):
        train(tmp_path, 5)


def test_what_is_superseded() -> None:
    steps = [100, 200, 300, 400, 500]
    assert superseded(steps, best=0) == [100, 200, 300]
    assert superseded(steps, best=200) == [100, 300]
    assert superseded(steps, best=500, keep_every=300) == [100, 200]
    assert superseded(steps[:2], best=0) == []


def test_a_best_is_of_one_measure() -> None:
    best = Best()
    assert best.take(2.0, 10, 7) and not best.take(3.0, 20, 7) and not best.take(float("nan"), 30, 7)
    assert (best.step, best.waited) == (10, 2)
    assert not best.take(2.0, 10, 7) and best.waited == 2  # measured again where it stands
    assert best.take(9.0, 40, 8) and (best.value, best.waited) == (9.0, 0)  # another judge: the old figure says nothing
    assert not Best().take(float("inf"), 1, 7)


@pytest.mark.parametrize("stage", ["vae", "vocoder"])
def test_no_loss_tells_the_best_weights_of_a_gan(stage: str, store: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--release best: no measure tells the best weights of {stage}"):
        train_stage(stage, small(), tmp_path, store=store, workers=0, release="best")


# ---------------------------------------------------------------------------------------- the distance of generated clips


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the stages before diffusion."""
    root, variant = tmp_path_factory.mktemp("judged"), small()
    tokenizers = train_tokenizers(["the sound of a tone", "noise", "clicks"] * 5, variant.clap, variant.t5)
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), tokenizers, strict=True):
        tokenizer.save_pretrained(root / "prepared" / name)
    torch.manual_seed(0)
    for stage in ("clap", "audiomae", "vae", "vocoder"):
        folder = root / "audiomae" if stage == "audiomae" else root
        stage_class(stage).build(variant, lambda name: root / "prepared").save(folder)
    return root


class Copies(nn.Module):
    """A stage whose clips are the real ones, with as much noise as told."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def reads_now(self, rng: np.random.Generator | None) -> tuple[str, ...]:
        return ()

    def example(self, clip: dict[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        return {"waveform": torch.from_numpy(np.asarray(clip["waveform"], np.float32))}

    def generate(self, batch: dict[str, Any]) -> Tensor:
        waveform: Tensor = batch["waveform"]
        return waveform + self.noise * torch.randn(waveform.shape, generator=torch.Generator().manual_seed(0))


def test_the_distance_grows_with_noise_and_is_none_for_the_clips_themselves(store: str, bundle: Path) -> None:
    clips = ClipDataset(FeatureStore.open(store), stage_class("audiomae"), ["waveform"], "train")
    variant = variant_of(1, listen_clips=8)
    job = TrainJob("audiomae", variant, store, "", {}, "")
    distance = Distance(job, JudgeAt("clap", str(bundle)), clips, Share(0, 1), torch.device("cpu"))
    same, near, far = (distance.of(Copies(noise)) for noise in (0.0, 0.02, 0.5))  # type: ignore[arg-type]
    assert distance.name == "frechet_clap" and same < 1e-6 < near < far
    assert distance.of(Copies(float("nan"))) == float("inf")  # type: ignore[arg-type]


def test_judges_in_their_order(tmp_path: Path) -> None:
    folders = {name: Place.of(tmp_path / name) for name in ("clap", "classifier", "vae")}
    entry = {"file": "v.pth", "sha256": "0", "licence": "", "source": ""}
    (tmp_path / "judges.json").write_text(json.dumps({"format": 1, "weights": {"vggish": entry}}))
    assert judge_at_hand(tmp_path, folders) == ("vggish", str(tmp_path))
    assert judge_at_hand(None, folders) == ("classifier", str(tmp_path / "classifier"))
    assert judge_at_hand(None, {"clap": folders["clap"]}) == ("clap", str(tmp_path / "clap"))
    assert judge_at_hand(None, {"vae": folders["vae"]}) is None


def test_workers_share_held_out_clips() -> None:
    shares = [held_out_share(10, Share(rank, 3), 1, 2) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2] and len(np.unique(np.concatenate(shares))) == 6


@pytest.mark.slow
def test_diffusion_is_judged_by_what_it_generates(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the budget of time, in MLflow and on the card."""
    variant = small(steps=2, batch=2)
    recipe = replace(variant.recipes.diffusion, listen_epochs=2 / 6, listen_clips=2, validate_every=2, checkpoint_every=2)  # every step
    variant = replace(variant, recipes=replace(variant.recipes, diffusion=recipe))
    store = make_store(tmp_path, variant, clips=12)
    folders = dict.fromkeys(("clap", "vae", "vocoder"), str(bundle))
    for name in ("loa", "latent", "text"):
        run_here(name, store, variant, {**folders, "audiomae": bundle / "audiomae"})
    distance, clock = Distance.of, [0.0]

    def heard(self: Distance, stage: Any) -> float:
        clock.append(clock[-1] + 1000.0)
        return distance(self, stage)

    monkeypatch.setattr(Distance, "of", heard)
    for module in (loop, watch):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[-1]))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with Tracker.open(uri, work=tmp_path, job="train-diffusion", variant="tiny") as tracker:
        output = train_stage("diffusion", variant, tmp_path, given=folders, workers=0, tracker=tracker)
        run_id = tracker.handle().run_id
    card, client = read_card(output, "diffusion"), MlflowClient(uri)
    released = card["released"]
    assert card["seconds"] < 1000 and clock[-1] >= 2000
    history = {metric.step: metric.value for metric in client.get_metric_history(run_id, "val/frechet_clap")}
    assert sorted(history) == [1, 2] and released["value"] == pytest.approx(min(history.values()))
    assert released["measure"] == "frechet_clap" and released["step"] == min(history, key=history.__getitem__)
    assert card["validation"]["frechet_clap"] == released["value"]
    assert json.loads(client.get_run(run_id).data.tags["loa.released"]) == released


def test_without_a_judge_a_loss_tells(bundle: Path, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.training.begin import _judge

    recipe = replace(small().recipes.diffusion, listen_epochs=1.0)
    variant = replace(small(), recipes=replace(small().recipes, diffusion=recipe))
    job = TrainJob("diffusion", variant, store, "", {}, "")
    assert _judge(stage_class("diffusion"), job, FeatureStore.open(store), {}, None) is None
    assert "there is no judge: give --judges DIR with VGGish, or train the classifier before; noise tells" in capsys.readouterr().err
