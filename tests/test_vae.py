"""The VAE stage: shapes, the reference's size, hand-computed losses, the two-step game, and release."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from pipelines.training.dataset import clip_rng
from pipelines.training.order import Turn
from stages.adversarial import balance, hinge_adversarial_loss, hinge_discriminator_loss
from stages.audio import AudioConfig
from stages.config import override
from stages.errors import UserError
from stages.vae.model import PatchCriticConfig, VAEConfig, VAELossConfig
from stages.vae.training import VAEStage, kl_divergence

AUDIO = AudioConfig(clip_seconds=0.64)  # 64 frames
CONFIG = VAEConfig(block_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_groups=4, start_mean=-6.0, start_std=3.0)
LOSS = VAELossConfig(kl_weight=1.0, critic_start=0, critic=PatchCriticConfig(channels=8, layers=2, norm="group"))


@pytest.fixture
def stage() -> VAEStage:
    torch.manual_seed(0)
    return VAEStage(CONFIG, LOSS, AUDIO)


def make_batch(stage: VAEStage, clips: int = 2, step: int = 0) -> dict:
    rng = np.random.default_rng(0)
    frames, bins = np.mgrid[:64, :64] / 64
    mels = [(4 * np.sin(6 * bins + (i + 2) * frames) - 6).astype(np.float16) for i in range(clips)]
    examples = [stage.example({"mel": mel}, rng) for mel in mels]
    return {name: torch.stack([e[name] for e in examples]) for name in examples[0]} | {"step": step}


def train(stage: VAEStage, batch: dict, steps: int) -> list[float]:
    optimisers = {name: torch.optim.Adam(part.parameters(), 2e-3) for name, part in stage.parts().items()}
    history = []
    for _ in range(steps):
        logs = {}
        for part, loss, terms in stage.losses(batch):
            optimisers[part].zero_grad()
            loss.backward()
            optimisers[part].step()
            logs |= terms
        history.append(float(logs["mel_l1"].detach()))
    return history


def test_the_full_size_is_the_references() -> None:
    with torch.device("meta"):
        vae = VAEConfig().build()
    assert sum(p.numel() for p in vae.parameters()) == 55_376_873
    assert sum(p.numel() for p in vae.encoder.parameters()) == 22_395_024
    assert sum(p.numel() for p in vae.decoder.parameters()) == 32_981_505
    assert VAEConfig().compression == 4
    assert VAEConfig().latent_shape(1024, 64) == (8, 256, 16)


def test_the_48_khz_size_is_the_references() -> None:
    config = VAEConfig(block_channels=(128, 256, 512, 1024), latent_channels=16)
    with torch.device("meta"):
        assert sum(p.numel() for p in config.build().parameters()) == 223_535_569
    assert config.latent_shape(1024, 256) == (16, 128, 32)


def test_the_tiny_size_makes_few_positions() -> None:
    config = VAEConfig.tiny()
    assert config.latent_shape(256, 64) == (32, 16, 4)
    assert sum(p.numel() for p in config.build().parameters()) < 3e6


def test_fresh_weights_may_start_where_mels_lie() -> None:
    """A network that starts at (mean, std) answers (mel - mean) / std as the plain one does, in the mel's own units."""
    torch.manual_seed(0)
    plain = replace(CONFIG, start_mean=0.0, start_std=1.0).build()
    torch.manual_seed(0)
    centred = replace(CONFIG, start_mean=-5.0, start_std=2.0).build()
    mel = torch.full((1, 1, 64, 64), -1.0)  # constant, and looked at away from the border, which pads with zeros
    torch.testing.assert_close(centred.encoder.conv_in(mel)[..., 1:-1, 1:-1], plain.encoder.conv_in((mel + 5) / 2)[..., 1:-1, 1:-1])
    features = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(centred.decoder.conv_out(features), 2 * plain.decoder.conv_out(features) - 5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="1022 x 64"):
        VAEConfig().latent_shape(1022, 64)
    with pytest.raises(UserError, match="norm_groups"):
        VAEConfig(block_channels=(100,))
    with pytest.raises(UserError, match="batch or group"):
        PatchCriticConfig(norm="layer")


def test_settings_reach_the_critic() -> None:
    changed = override(LOSS, {"critic.channels": "32", "kl_weight": "5"})
    assert (changed.critic.channels, changed.kl_weight) == (32, 5.0)


def test_the_patch_critic_sees_70_frames_by_70_bins() -> None:
    critic = PatchCriticConfig(channels=2).build().eval()
    mel = torch.zeros(1, 256, 256, requires_grad=True)
    critic(mel)[0, 0, 16, 16].backward()
    touched = mel.grad[0].abs().sum(1).nonzero().flatten()
    assert touched[-1] - touched[0] + 1 == 70


def test_losses_agree_with_hand_computation() -> None:
    assert kl_divergence(torch.tensor([0.0]), torch.tensor([0.0])) == 0
    # ½ (μ² + σ² - 1 - ln σ²) for μ = 2, σ² = 4, and for N(0, 1); then their mean
    expected = 0.5 * (4 + 4 - 1 - math.log(4)) / 2
    assert float(kl_divergence(torch.tensor([2.0, 0.0]), torch.tensor([math.log(4), 0.0]))) == pytest.approx(expected)

    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 2) / 2))
    assert float(hinge_adversarial_loss(fake)) == 1.0
    assert float(balance(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5]), 1e4)) == pytest.approx(5 / (0.5 + 1e-4))
    assert float(balance(torch.tensor([3.0, 4.0]), torch.zeros(2), 100.0)) == 100.0


def test_the_autoencoders_loss_is_the_weighted_sum(stage: VAEStage) -> None:
    batch = make_batch(stage, step=-1)
    (part, loss, logs), *rest = stage.losses(batch)
    assert (part, rest) == ("autoencoder", [])
    decoded = stage.autoencoder(batch["mel"], batch["noise"]).mel
    expected = (decoded - batch["mel"]).abs().sum() / 2 + LOSS.kl_weight * logs["kl"]
    torch.testing.assert_close(loss, expected)


def test_the_critic_steps_first_and_only_once_it_has_started(stage: VAEStage) -> None:
    stage.loss = replace(LOSS, critic_start=3)
    assert [part for part, _, _ in stage.losses(make_batch(stage, step=2))] == ["autoencoder"]
    parts = [part for part, _, _ in stage.losses(make_batch(stage, step=3))]
    assert parts == ["discriminator", "autoencoder"] == list(stage.parts())


def test_the_critics_loss_leaves_the_autoencoder_alone(stage: VAEStage) -> None:
    _, loss, _ = next(stage.losses(make_batch(stage)))
    loss.backward()
    assert all(p.grad is None for p in stage.autoencoder.parameters())
    assert all(p.grad is not None for p in stage.discriminator.parameters())


def test_the_last_layers_gradient_is_autograds(stage: VAEStage) -> None:
    batch = make_batch(stage)
    reconstruction = stage.autoencoder(batch["mel"], batch["noise"])
    loss = (reconstruction.mel - batch["mel"]).abs().sum()
    expected, output = torch.autograd.grad(loss, [stage.autoencoder.vae.decoder.conv_out.weight, reconstruction.mel])
    torch.testing.assert_close(stage.autoencoder.last_layer_gradient(reconstruction, output), expected)


def test_one_batch_is_learnt(stage: VAEStage) -> None:
    history = train(stage, make_batch(stage), 20)
    assert history[-1] < 0.5 * history[0]


def test_examples_depend_on_the_generator_alone(stage: VAEStage) -> None:
    clip = {"mel": np.zeros((64, 64), np.float16)}
    first, again, other = (stage.example(clip, np.random.default_rng(seed))["noise"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (4, 32, 32)


def test_windows_may_be_rolled_anew_in_every_epoch(stage: VAEStage) -> None:
    """A shift of the window by (seed, epoch, clip); without it nothing is other than before, and validation never shifts."""
    torch.manual_seed(0)
    rolling = VAEStage(CONFIG, replace(LOSS, augment_roll=True), AUDIO)
    batch = make_batch(rolling)
    clip = {"mel": batch["mel"][0].numpy()}
    by_epoch = [rolling.example(clip, clip_rng(1, Turn(epoch, 3, 0))) for epoch in range(12)]
    again = rolling.example(clip, clip_rng(1, Turn(5, 3, 0)))
    assert all(torch.equal(again[name], by_epoch[5][name]) for name in again)
    shifts = {int(example["roll"]) for example in by_epoch}
    assert len(shifts) > 6 and all(0 <= shift < 64 for shift in shifts)
    plain = stage.example(clip, clip_rng(1, Turn(5, 3, 0)))
    assert plain["roll"] == 0 and torch.equal(plain["noise"], again["noise"])

    batch["roll"] = torch.tensor([7, 63])
    shifted = batch | {"mel": torch.stack([mel.roll(int(by), 0) for mel, by in zip(batch["mel"], batch["roll"], strict=True)])}
    for (_, loss, _), (_, expected, _) in zip(rolling.losses(batch), stage.losses(shifted), strict=True):
        assert torch.equal(loss, expected)
    assert all(torch.equal(value, stage.validate(batch)[name]) for name, value in rolling.validate(batch).items())


def test_validation_hears_the_posterior_mean(stage: VAEStage) -> None:
    batch = make_batch(stage)
    measures = stage.validate(batch)
    latent = stage.autoencoder.vae.encode(batch["mel"][:, None]).latent_dist.mode()
    decoded = stage.autoencoder.vae.decode(latent).sample[:, 0]
    torch.testing.assert_close(measures["mel_l1"], (decoded - batch["mel"]).abs().mean())
    assert {name: tuple(x.shape) for name, x in stage.listen(batch).items()} == {
        "mel/original": (64, 64),
        "mel/reconstruction": (64, 64),
    }


def test_a_release_gives_the_same_weights(stage: VAEStage, tmp_path) -> None:
    batch = make_batch(stage)
    train(stage, batch, 1)
    stage.save(tmp_path)
    critic = load_file(tmp_path / "discriminator.safetensors")
    assert all(torch.equal(tensor, critic[name]) for name, tensor in stage.discriminator.state_dict().items())
    public = AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    decoded = public.decode(public.encode(batch["mel"][:, None]).latent_dist.mode()).sample[:, 0]
    # the centring of mel is folded into the public weights: other float32 sums, 7e-6 apart on one processor
    torch.testing.assert_close(decoded, stage.autoencoder(batch["mel"]).mel, atol=1e-4, rtol=1e-4)


def test_a_stage_is_built_from_its_variant() -> None:
    variant = SimpleNamespace(vae=CONFIG, vae_loss=LOSS, audio=AUDIO)
    built = VAEStage.build(variant, lambda name: pytest.fail(f"the VAE needs no earlier stage, asked for {name}"))
    assert list(built.parts()) == ["discriminator", "autoencoder"]
