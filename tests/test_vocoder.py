"""The vocoder stage: lengths, the reference's size, hand-computed losses, the two-step game, and release."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import SpeechT5HifiGan

from stages.adversarial import feature_matching_loss, least_squares_adversarial_loss, least_squares_discriminator_loss
from stages.audio import AUDIO_48K, AudioConfig, log_mel
from stages.errors import UserError
from stages.vocoder.model import CriticConfig, VocoderConfig, VocoderLossConfig
from stages.vocoder.training import VocoderStage, magnitude, spectral_loss

AUDIO = AudioConfig(clip_seconds=0.32)  # 5120 samples, 32 frames
CONFIG = VocoderConfig(
    upsample_rates=(8, 5, 4),
    upsample_kernels=(16, 11, 8),
    initial_channels=32,
    resblock_kernels=(3,),
    resblock_dilations=((1, 3),),
    initializer_range=0.1,
    mel_mean=-5.0,
    mel_std=2.0,
)
CRITICS = CriticConfig(periods=(2, 3), period_channels=(4, 8, 8), scales=2, scale_channels=(4, 4, 8, 8, 8, 8, 8))
LOSS = VocoderLossConfig(segment_samples=3200, critics=CRITICS, spectral_weight=5.0, spectral_windows=(256, 512))


def samples(config: VocoderConfig, frames: int, audio: AudioConfig = AUDIO) -> int:
    """How many samples the network returns for `frames` frames."""
    with torch.device("meta"):
        return config.build(audio)(torch.zeros(1, frames, audio.mel_bins)).shape[1]


@pytest.fixture
def stage() -> VocoderStage:
    torch.manual_seed(0)
    return VocoderStage(CONFIG, LOSS, AUDIO)


def test_segments_hold_sound(stage: VocoderStage) -> None:
    """Of a clip that is two thirds padding every segment has sound in its first half; silence itself is taken as it is."""
    rng, half = np.random.default_rng(0), LOSS.segment_samples // 2
    short = np.zeros(AUDIO.clip_samples, np.float32)
    short[: AUDIO.clip_samples // 3] = 0.1
    segments = torch.stack([stage.example({"waveform": short}, rng)["segment"] for _ in range(50)])
    assert segments.shape == (50, LOSS.segment_samples) and bool((segments[:, :half] != 0).any(1).all())
    assert len(segments.count_nonzero(1).unique()) > 10  # of all places, not one
    assert not stage.example({"waveform": 0 * short}, rng)["segment"].any()


def make_batch(stage: VocoderStage, clips: int = 2, step: int = 0) -> dict:
    rng = np.random.default_rng(0)
    time = np.arange(5120) / 16_000
    examples = [
        stage.example({"waveform": (0.4 * np.sin(2 * np.pi * f * time)).astype(np.float32)}, rng) for f in (300, 900, 500, 1500)[:clips]
    ]
    return {name: torch.stack([e[name] for e in examples]) for name in examples[0]} | {"step": step}


def train(stage: VocoderStage, batch: dict, steps: int) -> list[float]:
    optimisers = {name: torch.optim.Adam(part.parameters(), 2e-3, (0.8, 0.99)) for name, part in stage.parts().items()}
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
        vocoder = VocoderConfig().build(AudioConfig())
    assert sum(p.numel() for p in vocoder.parameters()) == 55_264_897
    assert samples(VocoderConfig(), 1024) == 163_872
    assert samples(VocoderConfig(), 512) == 81_952
    assert samples(VocoderConfig(), VocoderLossConfig().segment_samples // 160) == 8192


def test_the_48_khz_size_is_the_references() -> None:
    dilations = ((1, 3, 5),) * 4
    config = VocoderConfig((6, 5, 4, 2, 2), (12, 10, 8, 4, 4), 1536, (3, 7, 11, 15), dilations)
    with torch.device("meta"):
        assert sum(p.numel() for p in config.build(AUDIO_48K).parameters()) == 190_281_889
    assert samples(config, 100, AUDIO_48K) == 480 * 100 + 16


def test_the_tiny_vocoder_needs_no_cropping() -> None:
    config = VocoderConfig.tiny()
    assert samples(config, 256) == 40_960
    assert sum(p.numel() for p in config.build(AUDIO).parameters()) < 2e6


def test_critics_have_the_references_size() -> None:
    with torch.device("meta"):
        critics = CriticConfig().build()
    # Weights and biases of HiFi-GAN's convolutions as references.md#vocoder-loss lists them; a weight norm adds one length per channel.
    period = sum(5 * a * b + b for a, b in ((1, 32), (32, 128), (128, 512), (512, 1024), (1024, 1024))) + 3 * 1024 + 1
    widths, kernels, groups = (1, 128, 128, 256, 512, 1024, 1024, 1024), (15, 41, 41, 41, 41, 41, 5), (1, 4, 16, 16, 16, 16, 1)
    rows = zip(widths, widths[1:], kernels, groups, strict=False)
    scale = sum(k * (a // g) * b + b for a, b, k, g in rows) + 3 * 1024 + 1
    lengths = [p.numel() for name, p in critics.named_parameters() if name.endswith("original0")]
    assert sum(p.numel() for p in critics.parameters()) - sum(lengths) == 5 * period + 3 * scale


def test_critics_judge_by_period_and_by_scale() -> None:
    verdict = CRITICS.build()(torch.randn(2, 1000))
    assert [len(layers) for layers in verdict.features] == [4, 4, 8, 8]
    assert all(score.shape[0] == 2 and score.ndim == 2 for score in verdict.scores)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="multiply to 80"):
        replace(CONFIG, upsample_rates=(4, 5, 4)).build(AUDIO)
    with pytest.raises(UserError, match="differ in length"):
        replace(CONFIG, upsample_kernels=(16, 11))
    with pytest.raises(UserError, match="segment_samples is 8192"):
        VocoderStage(CONFIG, VocoderLossConfig(critics=CRITICS), AUDIO)


def test_losses_agree_with_hand_computation() -> None:
    real, fake = [torch.tensor([1.0, 0.5]), torch.tensor([0.0])], [torch.tensor([0.0, 1.0]), torch.tensor([2.0])]
    assert float(least_squares_discriminator_loss(real, fake)) == pytest.approx(0.25 / 2 + 0.5 + 1 + 4)
    assert float(least_squares_adversarial_loss(fake)) == pytest.approx(0.5 + 1)
    features = [[torch.tensor([1.0, 3.0]), torch.tensor([2.0])], [torch.tensor([0.0])]]
    others = [[torch.tensor([0.0, 1.0]), torch.tensor([2.5])], [torch.tensor([-1.0])]]
    assert float(feature_matching_loss(features, others)) == pytest.approx(1.5 + 0.5 + 1)


def test_the_spectral_loss_of_a_halved_waveform() -> None:
    torch.manual_seed(0)
    waveform = torch.randn(1, 4000)
    assert float(spectral_loss(waveform, waveform, (256, 512))) == 0
    # |½X| = ½|X|: the convergence is ½ and every log magnitude is ln 2 lower
    assert float(spectral_loss(waveform, 0.5 * waveform, (256, 512))) == pytest.approx(0.5 + np.log(2), abs=1e-4)
    assert float(magnitude(torch.zeros(1, 1000), 256).max()) == pytest.approx(1e-4)


def test_the_vocoders_loss_is_the_weighted_sum(stage: VocoderStage) -> None:
    _, (part, loss, logs) = stage.losses(make_batch(stage))
    expected = 45 * logs["mel_l1"] + 5 * logs["spectral"] + logs["adversarial"] + 2 * logs["features"]
    assert part == "vocoder"
    torch.testing.assert_close(loss, expected)


def test_the_critics_step_first_and_only_once_they_have_started(stage: VocoderStage) -> None:
    stage.loss = replace(LOSS, critic_start=3)
    assert [part for part, _, _ in stage.losses(make_batch(stage, step=2))] == ["vocoder"]
    parts = [part for part, _, _ in stage.losses(make_batch(stage, step=3))]
    assert parts == ["discriminator", "vocoder"] == list(stage.parts())


def test_the_critics_loss_leaves_the_vocoder_alone(stage: VocoderStage) -> None:
    _, loss, _ = next(stage.losses(make_batch(stage)))
    loss.backward()
    assert all(p.grad is None for p in stage.vocoder.parameters())
    assert all(p.grad is not None for p in stage.discriminator.parameters())


def test_one_batch_is_learnt(stage: VocoderStage) -> None:
    history = train(stage, make_batch(stage), 15)
    assert history[-1] < 0.7 * history[0]


def test_segments_come_from_the_clip_and_the_generator(stage: VocoderStage) -> None:
    clip = {"waveform": np.arange(5000, dtype=np.float32)}
    first, again, other = (stage.example(clip, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first["segment"], again["segment"]) and not torch.equal(first["segment"], other["segment"])
    assert first["waveform"].shape == (5120,) and not first["waveform"][5000:].any()
    start = int(first["segment"][0])
    assert torch.equal(first["segment"], first["waveform"][start : start + 3200])


def test_validation_covers_whole_clips(stage: VocoderStage) -> None:
    batch = make_batch(stage)
    fake = stage.vocoder(log_mel(batch["waveform"], AUDIO))[:, :5120].detach()
    expected = (log_mel(fake, AUDIO) - log_mel(batch["waveform"], AUDIO)).abs().mean()
    torch.testing.assert_close(stage.validate(batch)["mel_l1"], expected)
    heard = stage.listen(batch)
    assert {name: tuple(x.shape) for name, x in heard.items()} == {"audio/original": (5120,), "audio/resynthesis": (5120,)}


def test_a_longer_output_is_cut_to_the_clip() -> None:
    stage = VocoderStage(replace(CONFIG, upsample_kernels=(16, 12, 8)), LOSS, AUDIO)
    assert stage.listen(make_batch(stage))["audio/resynthesis"].shape == (5120,)
    assert all(torch.isfinite(loss) for _, loss, _ in stage.losses(make_batch(stage)))


def test_a_release_gives_the_same_weights(stage: VocoderStage, tmp_path) -> None:
    train(stage, make_batch(stage), 1)
    stage.save(tmp_path)
    critics = load_file(tmp_path / "discriminator.safetensors")
    assert all(torch.equal(tensor, critics[name]) for name, tensor in stage.discriminator.state_dict().items())
    mel = torch.randn(1, 8, 64)
    torch.testing.assert_close(SpeechT5HifiGan.from_pretrained(tmp_path / "vocoder").eval()(mel), stage.vocoder(mel))


def test_a_stage_is_built_from_its_variant() -> None:
    variant = SimpleNamespace(vocoder=CONFIG, vocoder_loss=LOSS, audio=AUDIO)
    built = VocoderStage.build(variant, lambda name: pytest.fail(f"the vocoder needs no earlier stage, asked for {name}"))
    assert list(built.parts()) == ["discriminator", "vocoder"]
