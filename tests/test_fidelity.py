"""docs/fidelity.md is complete and true: its options and tests exist, and what no other test pins is pinned here.

Run alone: python -m pytest tests/test_fidelity.py -q
"""

import ast
import json
import re
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from tiny_bundle import make_bundle
from torch import nn
from transformers import ClapFeatureExtractor

from pipelines.training.checkpoint import EMA
from stages.audiomae.model import AudioMAE, AudioMAEConfig
from stages.bundle import load, read_info
from stages.clap.model import ClapConfig, clap_mel
from stages.conditions import ClapDropout
from stages.config import override
from stages.diffusion.model import DiffusionConfig, LatentDiffusion, noise_schedule
from stages.diffusion.training import build_unet, prepare_latents
from stages.errors import UserError
from stages.files import write_json
from stages.frozen import TextEncoders
from stages.joint.model import System
from stages.joint.training import JointStage
from stages.translator.training import TranslatorStage, translation_loss
from stages.variants import resolve

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "fidelity.md"
FULL = resolve("audioldm2-full")


# ------------------------------------------------------------------------------------------------------------ the page


def rows() -> list[list[str]]:
    """Cells of every row of the page's tables whose last column names tests."""
    found, counted = [], 0
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip()[1:-1].split("|")] if line.startswith("|") else []
        if not cells:
            counted = 0
        elif cells[-1] == "test":
            counted = len(cells)
        elif counted and not set(line) <= set("|-"):
            assert len(cells) == counted, line
            found.append(cells)
    return found


def test_every_disagreement_of_the_register_has_a_row():
    numbers = [int(n) for row in rows() for n in re.findall(r"\d+", row[0])]
    assert sorted(numbers) == list(range(1, 25))


def test_named_tests_exist():
    assert len(rows()) > 30
    for row in rows():
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[-1])
        assert named and len(named) == row[-1].count("`") // 2, row
        for file, test in named:
            tree = ast.parse((REPO / "tests" / file).read_text(encoding="utf-8"))
            assert any(isinstance(node, ast.FunctionDef) and node.name == test for node in tree.body), f"{file}::{test}"


def test_named_options_exist():
    """In the column before: `loa command --option` of the command line, or `setting=value` of a variant."""
    checked = 0
    for row in rows():
        options = re.findall(r"`([^`]+)`", row[-2])
        assert options or row[-2].startswith("none"), row
        for option in options:
            checked += 1
            if option.startswith("loa "):
                _check_command(option)
            else:
                name, _, value = option.partition("=")
                changed = override(FULL, {name: value})
                assert changed != FULL, option
    assert checked > 15


def _check_command(line: str) -> None:
    import loa

    words = line.split()
    command = loa.main.get_command(click.Context(loa.main), words[1])
    assert command is not None, line
    options = {flag: p for p in command.params for flag in p.opts}
    for flag, value in zip(words[2::2], words[3::2], strict=True):
        assert flag in options, line
        options[flag].type.convert(value, options[flag], click.Context(command))


# ----------------------------------------------------------------------------------------------------------- AudioMAE


@pytest.mark.parametrize("blocks", [1, 3])
def test_feature_blocks_are_averaged_after_the_norm(blocks):
    torch.manual_seed(0)
    model = AudioMAE(AudioMAEConfig(width=16, depth=4, heads=2, frames=64, feature_blocks=blocks, decoder="none")).eval()
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    with torch.no_grad():
        feature = model.features(torch.randn(1, 64, 128))
        expected = torch.stack([model.norm(out) for out in outputs[-blocks:]]).mean(0)
    torch.testing.assert_close(feature, expected)
    assert AudioMAEConfig().feature_blocks == 3
    with pytest.raises(UserError, match="16, but AudioMAE has 12 blocks"):
        AudioMAEConfig(feature_blocks=16)


# -------------------------------------------------------------------------------------------------- translator and joint


def test_translation_loss_is_absolute_unless_told():
    predicted, loa = torch.tensor([[1.0, 4.0]]), torch.tensor([[0.0, 1.0]])
    assert translation_loss(predicted, loa, FULL.translator.loss).item() == 2.0
    assert translation_loss(predicted, loa, resolve("audioldm2-full", settings={"translator.loss": "mse"}).translator.loss).item() == 5.0


def test_recipes_are_the_stated_ones():
    translator, diffusion = FULL.recipes.translator, FULL.recipes.diffusion
    assert (translator.learning_rate, translator.warmup_steps, translator.decay) == (1e-4, 10_000, "constant")
    assert all(
        getattr(FULL.recipes, stage).clip_norm is None for stage in ("audiomae", "vae", "vocoder", "translator", "diffusion", "joint")
    )
    vocoder = FULL.recipes.vocoder
    assert [vocoder.rate_at(step, 0.5, epoch) for step, epoch in ((0, 0), (10, 0), (11, 3))] == pytest.approx([2e-4, 2e-4, 2e-4 * 0.999**3])
    assert (diffusion.learning_rate, diffusion.warmup_steps, diffusion.ema_decay) == (1e-4, 10_000, 0.9999)
    assert (FULL.vae_loss.kl_weight, FULL.vae_loss.adversarial_weight, FULL.vae_loss.critic_start) == (1000.0, 0.5, 25_000)
    assert (FULL.diffusion.condition_dropout, FULL.translator.clap_dropout, FULL.joint.ground_truth) == (0.1, 0.1, 0.25)
    assert resolve("audioldm2-ljs").joint.ground_truth == resolve("audioldm2-ljs-pretrained").joint.ground_truth == 1.0


def clip(rng, channels=4):
    """What a store gives of a clip, with an embedding that is not CLAP("")'s."""
    return {
        "t5": np.zeros((1, 3, 8), np.float16),
        "t5_length": np.array([3]),
        "clap_text": np.full((1, 6), 2.0, np.float16),
        "loa": np.zeros((2, 5), np.float16),
        "latent": np.concatenate([rng.normal(size=(channels, 4, 4)), np.full((channels, 4, 4), 0.5)]),
    }


@pytest.mark.parametrize(("probability", "low", "high"), [(0.1, 0.06, 0.14), (0.0, 0.0, 0.0)])
def test_clap_is_dropped_clip_by_clip(probability, low, high):
    null = torch.zeros(6) if probability else None
    stage = TranslatorStage(nn.Identity(), "l1", 4, None, ClapDropout(probability, null))
    rng = np.random.default_rng(0)
    seen = torch.stack([stage.example(clip(rng), rng)["clap"] for _ in range(1000)])
    assert low <= (seen == 0).all(1).float().mean() <= high and ((seen == 0) | (seen == 2)).all()


def test_the_dropped_clap_is_that_of_the_empty_text(tmp_path):
    clap = make_bundle(tmp_path / "bundle").with_name("bundle-stages") / "clap"
    variant = resolve("audioldm2-full", tiny=True, settings={"translator.clap_dropout": "0.5"})
    ClapDropout.prepare(variant, lambda stage: clap, tmp_path)
    dropout = ClapDropout.load(variant, lambda stage: tmp_path)
    torch.testing.assert_close(dropout.null_clap, TextEncoders.load(clap).clap_text([""])[0])
    assert ClapDropout.load(resolve("audioldm2-full", tiny=True), lambda stage: tmp_path).null_clap is None


class FakeSystem(nn.Module):
    """Predicts zeros, translates to threes, and remembers whose LOA it was given."""

    truths: list[bool] = []

    def forward(self, clap, text, mask, loa, noisy, timestep, use_truth, without=None):
        self.truths.append(use_truth)
        return torch.zeros_like(noisy), torch.full_like(loa, 3.0)


def test_joint_weighs_translation_twice_and_hears_the_truth_by_p_gt():
    process = LatentDiffusion(noise_schedule(), 1.0, None, 0.0)
    off = ClapDropout(0.0, None)
    stage = JointStage(FakeSystem(), process, None, FULL.joint, "l1", 4, None, off)  # type: ignore[arg-type]
    batch = {
        "clap": torch.zeros(2, 6),
        "text": torch.zeros(2, 4, 8),
        "text_mask": torch.ones(2, 4, dtype=torch.long),
        "loa": torch.ones(2, 2, 5),
        "latent": torch.zeros(2, 4, 4, 4),
        "noise": torch.full((2, 4, 4, 4), 2.0),
        "timestep": torch.tensor([1, 2]),
    }
    FakeSystem.truths.clear()
    for step in range(1000):
        ((part, loss, logs),) = stage.losses(batch | {"step_rng": np.random.default_rng(step)})
        assert (part, loss.item(), logs["noise"].item(), logs["loa"].item()) == ("system", 4.0 + 2.0 * 2.0, 4.0, 2.0)
    assert 0.2 < np.mean(FakeSystem.truths) < 0.3
    process.dropout = 1.0  # a batch without conditions says nothing of the translation
    ((_, loss, logs),) = stage.losses(batch | {"step_rng": np.random.default_rng(0)})
    assert (loss.item(), logs["loa"].item()) == (4.0, 2.0)


def test_a_batch_without_conditions_leaves_the_translator_alone():
    translator, network = nn.Linear(4, 4), nn.Linear(4, 4)

    def translate(clap, text, mask, loa=None):
        return translator(text)

    system = System(nn.Module(), nn.Module())  # type: ignore[arg-type]
    system.translator.forward, system.network.forward = translate, lambda noisy, t, loa, text, mask: network(noisy) + loa  # type: ignore[method-assign]
    x = torch.ones(2, 4)
    predicted, forced = system(x, x, x, x, x, x, use_truth=False, without=lambda loa, text, mask: (torch.zeros_like(loa), text, mask))
    predicted.sum().backward()
    assert translator.weight.grad is None and not forced.requires_grad and network.weight.grad is not None
    system(x, x, x, x, x, x, use_truth=False)[0].sum().backward()
    assert translator.weight.grad is not None


# ----------------------------------------------------------------------------------------------------------- diffusion


def test_conditions_are_dropped_together_for_the_whole_batch():
    null = torch.full((1, 8), 7.0)
    process = LatentDiffusion(noise_schedule(), 1.0, null, FULL.diffusion.condition_dropout)
    loa, text, mask = torch.ones(3, 2, 5), torch.ones(3, 4, 8), torch.ones(3, 4, dtype=torch.long)
    dropped = 0
    for step in range(1000):
        dropped += process.drops(np.random.default_rng(step))
    assert 70 <= dropped <= 130
    nothing, empty, empty_mask = process.without_conditions(loa, text, mask)
    assert not nothing.any() and torch.equal(empty, null.expand(3, 1, 8)) and empty_mask.shape == (3, 1) and empty_mask.all()


@pytest.mark.parametrize("name", ["audioldm2-full", "audioldm2-full-large", "audioldm2-ljs"])
def test_a_fresh_t_unet_says_nothing(name):
    """So that its first loss is the variance of the noise, 1.00 (it was 1.10)."""
    variant = resolve(name, tiny=True)
    network = build_unet(variant)
    torch.manual_seed(0)
    noisy = torch.randn(2, *variant.latent_shape)
    loa, text = torch.randn(2, variant.loa_tokens(4), variant.audiomae.width), torch.randn(2, 3, variant.t5.width)
    mask = torch.ones(2, 3, dtype=torch.long)
    assert not network(noisy, torch.tensor([1, 900]), loa, text, mask).any()
    # Their last layers learn at once, the others as soon as these are no longer zero.
    network(noisy, torch.tensor([1, 900]), loa, text, mask).square().sum().backward()
    assert network.unet.conv_out.weight.grad is not None


def heads(unet):
    return [[a.transformer_blocks[0].attn1.heads for a in getattr(block, "attentions", [])] for block in unet.down_blocks]


def test_heads_have_32_channels_unless_told():
    with torch.device("meta"):
        authors = DiffusionConfig().build(8, 256, 768, 1024)
        public = override(FULL, {"diffusion.heads": "[8,8,8,8]"}).diffusion.build(8, 256, 768, 1024)
    assert [sorted(set(level)) for level in heads(authors)] == [[], [8], [12], [20]]
    assert [sorted(set(level)) for level in heads(public)] == [[], [8], [8], [8]]


def test_folders_keep_the_heads_of_their_configuration(tmp_path):
    folder = make_bundle(tmp_path / "public")
    config = json.loads((folder / "unet" / "config.json").read_text())
    write_json(folder / "unet" / "config.json", config | {"attention_head_dim": 8})
    (folder / "loa.json").unlink()
    assert heads(load(folder).unet)[1] == [8] * 3


@pytest.mark.parametrize(
    ("name", "transformers", "blocks"), [("audioldm2-full", 3, 1), ("audioldm2-full-large", 4, 2), ("audioldm2-ljs", 2, 1)]
)
def test_transformers_per_place(name, transformers, blocks):
    variant = resolve(name)
    with torch.device("meta"):
        unet = variant.diffusion.build(8, 256, 768, None if variant.phonemes else 1024)
    place = unet.down_blocks[1]
    assert len(place.attentions) == transformers * variant.diffusion.layers_per_block
    assert {len(a.transformer_blocks) for a in place.attentions} == {blocks}


class Clips:
    """Clips whose latents have mean 0, deviation 3 between them, and 4 within the posterior: 5 in all."""

    def __len__(self):
        return 300

    def clip(self, index, series=()):
        rng = np.random.default_rng(index)
        return {"latent": np.concatenate([3 * rng.normal(size=(4, 16, 16)), np.full((4, 16, 16), 4.0)])}


def test_scale_factor_is_one_over_the_deviation_of_posterior_samples(tmp_path):
    prepare_latents(resolve("audioldm2-ljs"), None, Clips(), tmp_path)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "scale.json").read_text())["scale_factor"] == pytest.approx(1 / 5, rel=0.01)


def test_averages_warm_up_as_the_references():
    part = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(part.weight)
    ema, expected = EMA({"unet": part}, 0.9999), 0.0
    for n in range(1, 6):
        part.weight.data.fill_(float(n))
        ema.update()
        decay = (1 + n) / (10 + n)
        expected = decay * expected + (1 - decay) * n
    with ema.swapped_in():
        assert part.weight.item() == pytest.approx(expected)
    assert part.weight.item() == 5.0


def test_joint_averages_the_t_unet_alone():
    parts = {"system": nn.ModuleDict({"translator": nn.Linear(2, 2), "network": nn.Linear(2, 2)})}
    assert sorted(EMA(parts, 0.9999, JointStage.averaged).average) == ["system.network.bias", "system.network.weight"]


def test_the_phoneme_encoder_is_vits():
    with torch.device("meta"):
        encoder = resolve("audioldm2-ljs").phonemes.build().text_encoder
    assert sum(p.numel() for p in encoder.parameters()) == 6_327_744


# ---------------------------------------------------------------------------------------------------------------- CLAP


def test_short_clips_are_repeated_for_clap():
    """As `ClapFeatureExtractor` does with "repeatpad"; the authors' code stretches them in time."""
    extractor = ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=16_000,
        hop_length=160,
        max_length_s=1,
        fft_window_size=512,
        frequency_max=8000,
        truncation="rand_trunc",
        padding="repeatpad",
    )
    waveform = np.random.default_rng(0).normal(size=(1, 6000)).astype(np.float32)
    theirs = extractor(list(waveform), sampling_rate=16_000, return_tensors="pt").input_features
    torch.testing.assert_close(clap_mel(torch.from_numpy(waveform), extractor), theirs, atol=1e-3, rtol=1e-4)


def test_clap_has_robertas_epsilon_and_frozen_encoders_rest(tmp_path):
    with torch.device("meta"):
        assert ClapConfig().build().config.text_config.layer_norm_eps == 1e-5
    encoders = TextEncoders.load(make_bundle(tmp_path / "bundle"))
    assert not any(module.training for module in encoders.modules())
    assert not any(parameter.requires_grad for parameter in encoders.parameters())


# -------------------------------------------------------------------------------------------------------------- folders


def test_public_speech_folders_speak_512_vectors(tmp_path):
    """They carry the sound models' 8 (references.md#public-folders)."""
    folder = make_bundle(tmp_path / "public-speech", speech=True)
    (folder / "loa.json").unlink()
    config = folder / "language_model" / "config.json"
    write_json(config, json.loads(config.read_text()) | {"max_new_tokens": 8})
    (folder / "language_model" / "generation_config.json").unlink(missing_ok=True)
    info = read_info(folder)
    assert (info.speech, info.loa_tokens) == (True, 512)


def test_the_core_needs_neither_torchaudio_nor_librosa():
    files = [path for package in ("stages", "pipelines", "serving") for path in (REPO / package).rglob("*.py")]
    named = {
        alias.name.split(".")[0]
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    named |= {
        node.module.split(".")[0]
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert "torch" in named and not named & {"torchaudio", "librosa"}
