"""AudioMAE against the reference's numbers, its pooling to LOA, its checkpoints, and its pretraining.

Run alone: python -m pytest tests/test_audiomae.py -q
"""

import argparse
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.audio import AudioConfig
from stages.audiomae.model import AudioMAE, AudioMAEConfig, SwinBlock, load_weights, pool_loa, position_table
from stages.audiomae.training import AudioMAEStage
from stages.errors import UserError

PUBLISHED = AudioMAEConfig()
GOLDEN = AudioMAEConfig(width=64, heads=4, decoder="global", decoder_width=32, decoder_depth=2, decoder_heads=4)
TINY = AudioMAEConfig(
    width=32, depth=4, heads=2, frames=256, feature_blocks=1, decoder="global", decoder_width=32, decoder_depth=1, decoder_heads=2
)
TINY_AUDIO = AudioConfig(clip_seconds=2.56)


@pytest.fixture(scope="module")
def golden(shared):
    values = np.load(shared / "golden" / "audiomae.npz")
    weights = {key.removeprefix("weights/"): torch.from_numpy(values[key]) for key in values.files if key.startswith("weights/")}
    return {key: torch.from_numpy(values[key]) for key in ("fbank", "feature", "pred", "mask", "loss")}, weights


@pytest.fixture(params=["global", "swin"])
def tiny(request):
    torch.manual_seed(0)
    return AudioMAE(replace(TINY, decoder=request.param))


def test_features_match_the_reference(golden):
    values, weights = golden
    model = AudioMAE(GOLDEN).eval()
    assert torch.equal(model.pos_embed, weights["pos_embed"])
    load_weights(model, weights, "golden")
    with torch.inference_mode():
        torch.testing.assert_close(model.features(values["fbank"][None]), values["feature"], atol=1e-4, rtol=0)
        # The golden prediction and mask are drawn numbers (deviation 0.3, no two patches alike): they pin the loss alone.
        loss = model.loss(values["fbank"][None], values["pred"], values["mask"])
    assert loss.item() == pytest.approx(values["loss"].item(), rel=1e-5)


@pytest.mark.parametrize("pooling", [1, 2, 4, 8])
def test_pooling_matches_the_reference(shared, pooling):
    values = np.load(shared / "golden" / "loa_pooling.npz")
    loa = pool_loa(torch.from_numpy(values["feature"]), (64, 8), pooling).numpy()
    np.testing.assert_allclose(loa, values[f"loa{pooling}"], atol=1e-6)


@pytest.mark.parametrize(("pooling", "tokens"), [(1, 128), (2, 32), (4, 8), (8, 2), (16, 1)])
def test_pooling_of_a_short_clip(pooling, tokens):
    feature = torch.randn(2, 129, 4, generator=torch.Generator().manual_seed(0))
    loa = pool_loa(feature, TINY.grid, pooling)
    assert loa.shape == (2, tokens, 4)
    times = feature[:, 1:].view(2, 16, 8, 4)[:, :pooling, : min(pooling, 8)].flatten(1, 2)  # what the first vector pools
    torch.testing.assert_close(loa[:, 0], (times.mean(1) + times.amax(1)) / 2)


def test_pooling_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="pooling 3 does not divide"):
        pool_loa(torch.zeros(1, 129, 4), (16, 8), 3)
    with pytest.raises(ValueError, match=r"\[B, 513, D\]"):
        pool_loa(torch.zeros(1, 129, 4), (64, 8), 8)


def test_published_sizes():
    with torch.device("meta"):
        sizes = {
            decoder: sum(value.numel() for value in AudioMAE(replace(PUBLISHED, decoder=decoder, decoder_depth=8)).state_dict().values())
            for decoder in ("none", "global")
        }
    assert sizes == {"none": 85_648_128, "global": 111_656_448}


def test_positions_are_those_of_the_transposed_grid():
    table = position_table(8, (16, 8))[0]
    omega = np.array([1.0, 0.01])
    for token in (0, 5, 77):
        first, second = token % 16, token // 16
        expected = np.concatenate([np.sin(first * omega), np.cos(first * omega), np.sin(second * omega), np.cos(second * omega)])
        np.testing.assert_allclose(table[1 + token], expected, atol=1e-6)
    assert not table[0].any()


def test_the_noise_decides_the_mask(tiny):
    fbank, noise = torch.randn(2, 256, 128), torch.rand(2, 128)
    first, second = tiny(fbank, noise), tiny(fbank, noise)
    assert torch.equal(first.prediction, second.prediction)
    assert first.prediction.shape == (2, 128, 256)
    assert first.mask.sum(1).tolist() == [103, 103]  # 25 of 128 patches are seen
    assert (noise * first.mask).amax() == noise.amax()
    assert noise[0][first.mask[0] == 0].max() < noise[0][first.mask[0] == 1].min()


def test_bfloat16_stays_close(tiny):
    fbank, noise = torch.randn(2, 256, 128), torch.rand(2, 128)
    exact = tiny(fbank, noise).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = tiny(fbank, noise).loss
        assert tiny.features(fbank).isfinite().all()
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)


def test_hidden_patches_stay_hidden(tiny):
    noise = torch.rand(1, 128)
    fbank = torch.randn(1, 256, 128)
    seen = tiny(fbank, noise)
    elsewhere = torch.where(tiny.unpatch(seen.mask[..., None].expand(-1, -1, 256)) > 0, torch.randn_like(fbank), fbank)
    assert torch.equal(tiny(elsewhere, noise).prediction, seen.prediction)


def test_patches_can_be_laid_out_again(tiny):
    fbank = torch.randn(2, 256, 128)
    patches, mean, deviation = tiny.normalised_patches(fbank)
    torch.testing.assert_close(patches.mean(-1), torch.zeros(2, 128), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.var(-1), torch.ones(2, 128), atol=1e-4, rtol=0)
    torch.testing.assert_close(tiny.unpatch(patches * deviation + mean), fbank)
    torch.testing.assert_close((patches * deviation + mean)[1, 11], fbank[1, 16:32, 48:64].flatten())  # token 8·1 + 3


def test_shifted_windows_do_not_join_the_ends_of_a_clip():
    torch.manual_seed(0)
    block = SwinBlock(16, 2, 2.0, (16, 8), shifted=True)
    torch.nn.init.ones_(block.norm1.weight)
    clip = torch.randn(1, 16, 8, 16)
    changed = clip.clone()
    changed[:, -1] += 1.0
    with torch.inference_mode():
        moved = (block(clip.flatten(1, 2)) - block(changed.flatten(1, 2))).view(16, 8, 16).abs().amax((1, 2))
    assert moved[14:].min() > 1e-3  # the window of the last two rows holds the first two as well, behind the mask
    assert moved[:14].max() == 0.0


def test_saving_and_loading(tiny, tmp_path):
    tiny.save(tmp_path)
    loaded = AudioMAE.load(tmp_path)
    assert loaded.config == tiny.config and not loaded.training
    fbank = torch.randn(1, 256, 128)
    assert torch.equal(loaded.features(fbank), tiny.features(fbank))
    with pytest.raises(UserError, match="loa train audiomae"):
        AudioMAE.load(tmp_path / "elsewhere")


def test_official_checkpoints_load(tiny, tmp_path):
    path = tmp_path / "pretrained.pth"
    torch.save({"model": tiny.state_dict(), "epoch": 32, "args": argparse.Namespace(mask_ratio=0.8)}, path)
    fbank = torch.randn(1, 256, 128)
    for config in (tiny.config, replace(tiny.config, decoder="none")):
        loaded = AudioMAE.load_pretrained(path, config)
        assert torch.equal(loaded.features(fbank), tiny.features(fbank))
    assert not [key for key in loaded.state_dict() if key.startswith("decoder")]


def test_the_published_decoder_has_the_published_names():
    with torch.device("meta"):
        keys = set(AudioMAE(PUBLISHED).state_dict())
    prefix = "decoder_blocks.15."
    assert {key.removeprefix(prefix) for key in keys if key.startswith(prefix)} == {
        "attn.tau",
        "attn.qkv.weight",
        "attn.qkv.bias",
        "attn.proj.weight",
        "attn.proj.bias",
        "attn.meta_mlp.fc1.weight",
        "attn.meta_mlp.fc1.bias",
        "attn.meta_mlp.fc2.weight",
        "attn.meta_mlp.fc2.bias",
        "norm1.weight",
        "norm1.bias",
        "norm2.weight",
        "norm2.bias",
        "mlp.fc1.weight",
        "mlp.fc1.bias",
        "mlp.fc2.weight",
        "mlp.fc2.bias",
    }


def test_misfits_are_named(tmp_path):
    path = tmp_path / "weights.pth"
    state = AudioMAE(TINY).state_dict()
    state["norm.wieght"] = state.pop("norm.weight")
    state["cls_token"] = torch.zeros(1, 1, 48)
    torch.save({"model": state}, path)
    with pytest.raises(UserError) as error:
        AudioMAE.load_pretrained(path, TINY)
    for part in ("1 missing (norm.weight)", "norm.wieght, nearest norm.weight", "cls_token, [1, 1, 48] instead of [1, 1, 32]"):
        assert part in str(error.value)

    torch.save({"state_dict": state}, path)
    with pytest.raises(UserError, match="the key 'model', got the keys state_dict"):
        AudioMAE.load_pretrained(path, TINY)
    path.write_text("not a checkpoint")
    with pytest.raises(UserError, match="not a file of plain weights"):
        AudioMAE.load_pretrained(path, TINY)
    with pytest.raises(UserError, match="no AudioMAE checkpoint"):
        AudioMAE.load_pretrained(tmp_path / "missing.pth")


@pytest.mark.parametrize("change", [{"decoder": "mamba"}, {"frames": 250}, {"feature_blocks": 5}, {"decoder": "swin", "bins": 32}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(UserError):
        replace(TINY, **change)


def test_features_refuse_another_length(tiny):
    with pytest.raises(ValueError, match=r"\[B, 256, 128\], got \[1, 1024, 128\]"):
        tiny.features(torch.zeros(1, 1024, 128))


# ------------------------------------------------------------------------------------------------------ training


def batch_of(stage: AudioMAEStage, clips: list[np.ndarray], seed: int = 0) -> dict[str, torch.Tensor]:
    examples = [stage.example({"waveform": clip}, np.random.default_rng([seed, i])) for i, clip in enumerate(clips)]
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


@pytest.fixture
def clips():
    time = np.arange(TINY_AUDIO.clip_samples) / 16_000
    return [(0.5 * np.sin(2 * np.pi * hz * time * (1 + 0.2 * time))).astype(np.float32) for hz in (200, 400, 800, 1600)]


def test_one_batch_is_learnt(clips):
    torch.manual_seed(0)
    stage = AudioMAEStage.build(SimpleNamespace(audiomae=replace(TINY, decoder="swin"), audio=TINY_AUDIO), lambda name: None)
    batch = batch_of(stage, clips)
    before = stage.validate(batch)["reconstruction"].item()
    optimiser = torch.optim.AdamW(stage.parts()["audiomae"].parameters(), 3e-3)
    for _ in range(40):
        for part, loss, logs in stage.losses(batch):
            assert part == "audiomae" and logs["reconstruction"].isfinite()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert stage.validate(batch)["reconstruction"].item() < 0.8 * before
    unused = [name for name, parameter in stage.model.named_parameters() if parameter.grad is None]
    assert not unused


def test_examples_repeat_and_validation_never_changes(clips):
    stage = AudioMAEStage(TINY, TINY_AUDIO)
    first, again, other = (batch_of(stage, clips, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["noise"], other["noise"]) and not torch.equal(first["roll"], other["roll"])
    assert torch.equal(stage.validate(first)["reconstruction"], stage.validate(other)["reconstruction"])
    assert ((first["gain"] > 0.5) & (first["gain"] < 1.5)).all()

    plain = AudioMAEStage(replace(TINY, augment_roll=False, augment_gain=False), TINY_AUDIO)
    batch = batch_of(plain, clips)
    assert not batch["roll"].any() and (batch["gain"] == 1).all()


def test_images_to_look_at(clips, tmp_path):
    stage = AudioMAEStage(TINY, TINY_AUDIO)
    images = stage.listen(batch_of(stage, clips))
    assert {name: image.shape for name, image in images.items()} == {
        f"mel/{name}": (256, 128) for name in ("original", "seen", "completed")
    }
    visible = images["mel/seen"] != images["mel/original"].min()
    torch.testing.assert_close(images["mel/completed"][visible], images["mel/original"][visible], atol=1e-4, rtol=0)
    stage.save(tmp_path / "audiomae")
    assert AudioMAE.load(tmp_path / "audiomae").config == TINY


def test_a_stage_that_cannot_train_says_so():
    with pytest.raises(UserError, match="without a decoder"):
        AudioMAEStage(replace(TINY, decoder="none"), TINY_AUDIO)
    with pytest.raises(UserError, match="clips of 10.24 s give 1024 x 128"):
        AudioMAEStage(TINY, AudioConfig())
