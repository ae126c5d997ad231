"""What a training watches over: spikes of losses, critics that teach nothing, and stores that do not suit a stage."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_store import make_store, run_here, small

from pipelines.tracking import Tracker
from pipelines.train import train_stage
from pipelines.training import guards
from pipelines.training.dataset import ClipDataset
from pipelines.training.guards import ENOUGH, LOGS, Critic, Guard, Spikes
from pipelines.weights import released_folders
from stages.adversarial import hinge_discriminator_loss, least_squares_discriminator_loss, standing
from stages.base import release, stage_class
from stages.errors import UserError
from stages.variants import Variant

# ------------------------------------------------------------------------------------------------------------- spikes


def spikes_in(series: np.ndarray, part: str = "unet") -> list[int]:
    watch = Spikes()
    return [spike.step for step, loss in enumerate(series) for spike in watch.see(step, {part: float(loss)})]


def noise(steps: int, seed: int = 0) -> np.ndarray:
    """Losses of batches: a falling curve times log-normal noise of 20 %."""
    rng = np.random.default_rng(seed)
    return (0.3 + np.exp(-np.arange(steps) / 100)) * np.exp(0.2 * rng.standard_normal(steps))


def test_a_spike_is_told_once_where_it_begins() -> None:
    series = noise(1000)
    series[400:407] *= 20  # a spike of seven steps
    series[403] = 0.3  # with a lull in it
    series[700] *= 20  # and another one
    assert spikes_in(series) == [400, 700]


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_losses_are_no_spikes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert spikes_in(noise(3000, seed)) == []
    assert spikes_in(np.full(500, 2.0)) == []  # no deviation at all
    assert spikes_in(1.0 + 1e-6 * rng.standard_normal(500)) == []
    assert spikes_in(-noise(1000, seed)) == []  # a hinge game's loss is negative
    assert spikes_in(rng.standard_t(10, 3000)) == []  # and some have heavier tails than noise


def test_what_was_seen_before_and_what_is_not_finite_says_nothing() -> None:
    early = noise(1000)
    early[ENOUGH // 2] *= 100
    assert spikes_in(early) == []
    infinite = noise(1000)
    infinite[300:310] = np.inf
    infinite[500] = np.nan
    assert spikes_in(infinite) == []
    step = noise(1000)
    step[500:] += 10  # a new level is told once and becomes usual
    assert spikes_in(step) == [500]


def test_a_critic_that_joins_makes_losses_new() -> None:
    watch = Spikes()
    for step in range(200):
        assert not watch.see(step, {"autoencoder": 1.0})
    for step in range(200, 400):
        assert not watch.see(step, {"discriminator": 1.0, "autoencoder": 50.0})  # it has the critic's term now
    assert [(s.part, s.usual) for s in watch.see(400, {"discriminator": 90.0, "autoencoder": 50.0})] == [("discriminator", 1.0)]


# ------------------------------------------------------------------------------------------------------------ critics


def faults(accuracy: np.ndarray, doubt: np.ndarray) -> list[tuple[int, str]]:
    critic = Critic()
    said = [(log, critic.see(float(a), float(d))) for log, (a, d) in enumerate(zip(accuracy, doubt, strict=True))]
    return [(log, fault.split(",")[0]) for log, fault in said if fault]


def test_a_critic_is_dead_when_it_guesses_or_is_never_wrong() -> None:
    rng = np.random.default_rng(0)
    lively = 0.7 + 0.1 * rng.standard_normal(300), 0.9 + 0.1 * rng.standard_normal(300)
    assert faults(*lively) == []
    guessing = np.concatenate([lively[0][:100], 0.5 + 0.01 * rng.standard_normal(200)])
    ((log, fault),) = faults(guessing, lively[1])
    assert 100 + LOGS // 2 < log <= 100 + LOGS and fault == "it no longer tells real from made"
    winning = np.concatenate([lively[1][:100], np.full(200, 1e-4)])
    assert faults(np.full(300, 1.0), winning) == [(100 + LOGS - 1, "it is never wrong")]
    assert faults(np.full(300, 1.0), np.full(300, 0.2)) == []  # it wins, but not beyond learning
    assert faults(np.full(LOGS - 1, 0.5), np.full(LOGS - 1, 1.0)) == []  # at its beginning every critic guesses


def test_how_a_critic_stands() -> None:
    real, fake = [torch.tensor([2.0, 0.5])], [torch.tensor([-1.0, 0.2])]
    loss = hinge_discriminator_loss(real[0], fake[0])
    logs = standing(real, fake, loss, middle=0.0, at_chance=1.0)
    assert float(logs["critic_accuracy"]) == 0.75 and float(logs["critic_doubt"]) == pytest.approx(0.5 * (0.25 + 0.6))
    for constant in (-3.0, 0.0, 0.5, 4.0):  # of a critic that says the same of everything
        same = [torch.full((4,), constant), torch.full((2,), constant)]
        assert float(standing(same, same, loss, 0.5, 1.0)["critic_accuracy"]) == 0.5
    guess = [torch.full((4,), 0.5)] * 3
    chance = standing(guess, guess, least_squares_discriminator_loss(guess, guess), middle=0.5, at_chance=1.5)
    assert float(chance["critic_doubt"]) == pytest.approx(1.0)


# -------------------------------------------------------------------------------------------------------- in training


class Notes:
    """A tracker that keeps metrics."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, str, float]] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.kept += [(step, name, value) for name, value in values.items()]


def test_a_watch_names_step_and_clips_and_logs(capsys: pytest.CaptureFixture[str]) -> None:
    watch, notes = Guard("vae", 0, 1, steps_before=1000), Notes()
    for step in range(ENOUGH + 30):
        loss = 1.0 if step != ENOUGH + 13 else 99.0
        watch.add(step, 4 * step, {"loss/vae": torch.tensor(loss), "kl": torch.tensor(1e9)})
        if step % 10 == 9:
            watch.look({}, lambda cursor: [f"clip-{cursor + i}" for i in range(12)], notes)  # type: ignore[arg-type]
    at = 4 * (ENOUGH + 13)
    assert notes.kept == [(1000 + ENOUGH + 13, "guards/spike_vae", 99.0)]
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"vae: the loss of 'vae' jumped to 99 at step {ENOUGH + 13}; the median before is 1; its clips: clip-{at}, ")
    assert told.endswith(f"clip-{at + 7} and 4 more")


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Variant]:
    """A project folder with a store, and the variant that it was made for."""
    make_store(work := tmp_path_factory.mktemp("guards"), variant := quick(small()))
    return work, variant


def quick(variant: Variant) -> Variant:
    """With a VAE of few channels."""
    return replace(variant, vae=replace(variant.vae, block_channels=(8,) * 5, norm_groups=4))


def test_a_training_tells_of_a_spike_and_of_a_dead_critic(
    line: tuple[Path, Variant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One loss is made fifty times as large, and the critic's last layer says nothing."""
    from stages.vae.training import VAEStage

    monkeypatch.setattr(guards, "ENOUGH", 10)
    monkeypatch.setattr(guards, "LOGS", 2)
    monkeypatch.setattr(Critic, "__init__", _short_memory)
    losses, kept = VAEStage.losses, Notes()

    def strange(self: VAEStage, batch: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor, dict[str, torch.Tensor]]]:
        factor = 50.0 if batch["step"] == 24 else 1.0
        self.discriminator.layers[-1].register_forward_hook(lambda module, inputs, output: 0 * output)
        for part, loss, logs in losses(self, batch):
            yield part, loss * (factor if part == "autoencoder" else 1.0), logs

    monkeypatch.setattr(VAEStage, "losses", strange)
    monkeypatch.setattr(Tracker, "metrics", lambda self, values, step: kept.metrics(values, step))
    work, variant = line
    recipe = replace(variant.recipes.vae, steps=30, global_batch=2, validate_every=1000, checkpoint_every=1000, learning_rate=1e-5)
    strange_one = replace(variant, recipes=replace(variant.recipes, vae=recipe), vae_loss=replace(variant.vae_loss, critic_start=0))
    train_stage("vae", strange_one, tmp_path, store=str(work / "store"), workers=0)
    told = [line for line in capsys.readouterr().err.splitlines() if "vae: the " in line]
    assert len(told) == 2 and "'autoencoder' jumped" in told[1] and "at step 24;" in told[1] and told[1].count("made-") == 2, told
    assert "the critic is of no use up to step 19: it no longer tells real from made" in told[0] and "accuracy 0.50" in told[0]
    assert {(step, name) for step, name, _ in kept.kept if "guards" in name} == {
        (24, "guards/spike_autoencoder"),
        (19, "guards/dead_critic"),
    }


def _short_memory(self: Critic) -> None:
    self.recent, self.told = guards.deque(maxlen=guards.LOGS), ""


# ------------------------------------------------------------------------------------------- stores that do not suit


@pytest.fixture(scope="module")
def latents(line: tuple[Path, Variant], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Variant]:
    """A project with everything that the diffusion stage reads."""
    work, variant = line
    folder = tmp_path_factory.mktemp("latents")
    store = make_store(folder, variant)
    for name in ("clap", "audiomae", "vae", "vocoder"):  # weights that nothing has trained
        cls, prepared = stage_class(name), folder / "prepared" / name
        prepared.mkdir(parents=True)
        cls.prepare(variant, lambda _: prepared, ClipDataset(store, cls, cls.reads(variant), "train"), prepared)  # noqa: B023
        release(cls.build(variant, lambda _: prepared), folder / "stages" / name, {"steps": 0, "seconds": 0.0})  # noqa: B023
    for name in ("loa", "latent", "text"):
        run_here(name, store, variant, released_folders(folder, {}))
    return folder, variant


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import cluster

    def connect(*_: object, **__: object) -> None:
        raise AssertionError("a Ray was started")

    monkeypatch.setattr(cluster, "connect", connect)


@pytest.mark.usefixtures("no_ray")
def test_a_series_of_other_weights_is_refused_before_a_worker_is_asked_for(latents: tuple[Path, Variant], tmp_path: Path) -> None:
    work, variant = latents
    shutil.copytree(work / "stages", tmp_path / "stages")
    path = tmp_path / "stages" / "vae" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"the series 'latent' of .* was made with other weights of vae \(vae\) than those in .*--with vae="
    ):
        train_stage("diffusion", variant, tmp_path, store=str(work / "store"), workers=1)
    with pytest.raises(AssertionError, match="a Ray was started"):  # with its own weights it goes on to the workers
        train_stage("diffusion", variant, tmp_path, store=str(work / "store"), workers=1, given={"vae": str(work / "stages" / "vae")})


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("stage", "change", "told"),
    [
        ("diffusion", {"vae": {"latent_channels": 4}}, "'latent' .* holds latent of 64 x 16 x 4, and .* expects 8 x 16 x 4;"),
        ("diffusion", {"audiomae": {"width": 96}}, "'loa-.' .* holds loa of .* expects .* x 96;"),
        ("translator", {"clap": {"projection_dim": 24}}, "'text' .* holds clap_text of .* expects 24 at the end;"),
    ],
)
def test_a_series_of_other_sizes_is_refused_before_a_worker_is_asked_for(
    latents: tuple[Path, Variant], tmp_path: Path, stage: str, change: dict[str, dict[str, int]], told: str
) -> None:
    work, variant = latents
    other = replace(variant, **{name: replace(getattr(variant, name), **fields) for name, fields in change.items()})
    given = {name: str(work / "stages" / name) for name in ("clap", "vae", "vocoder")} if stage == "diffusion" else {}
    with pytest.raises(UserError, match=f"the series {told}"):
        train_stage(stage, other, tmp_path, store=str(work / "store"), workers=1, given=given)
