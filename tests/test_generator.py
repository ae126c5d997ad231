"""The generator: the properties that users rely on. How it compares with the references is in test_sampling.py."""

import numpy as np
import pytest
import torch
from tiny_bundle import AUDIO, LOA_TOKENS, LOA_WIDTH

from stages.errors import UserError
from stages.generator import AudioGenerator
from stages.sampling import SCHEDULERS

FEW = {"num_inference_steps": 4}


# -------------------------------------------------------------------------------------------------------- conditions


def test_conditions_matter(generator):
    plain = generator.generate("a dog barks", **FEW)
    changes = {"prompts": "rain", "negative_prompts": "birds", "guidance_scale": 5.0, "seed": 1, "unconditional": "diffusers"}
    for change in ({name: value} for name, value in changes.items()):
        other = generator.generate(**({"prompts": "a dog barks"} | change), **FEW)
        assert np.abs(other - plain).max() > 1e-3, change


def test_a_prompt_does_not_depend_on_its_neighbours(generator):
    prompts = ["a dog", "a much longer prompt about rain", "birds sing", ""]
    negatives = [None, "noise", "", "wind and more wind"]
    together = generator.generate(prompts, negative_prompts=negatives, seed=[5, 6, 7, 8], **FEW)
    for i, prompt in enumerate(prompts):
        alone = generator.generate(prompt, negative_prompts=negatives[i], seed=5 + i, **FEW)
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5)


def test_variations_start_with_the_seed_itself(generator):
    three = generator.generate(["rain", "a dog"], num_waveforms_per_prompt=3, seed=4, **FEW)
    assert three.shape == (6, AUDIO.clip_samples)
    np.testing.assert_allclose(three[[0, 3]], generator.generate(["rain", "a dog"], seed=4, **FEW), atol=1e-5)
    assert min(np.abs(three[0] - three[1]).max(), np.abs(three[1] - three[2]).max()) > 1e-3


def test_zeros_needs_no_loa_without_a_prompt(generator):
    """What training calls no condition: LOA of zeros, T5 of the empty text."""
    conditioning = generator.encode_prompts(["a dog", "rain"])
    without = generator._without(conditioning, [None, "wind"], "zeros")
    assert not without.loa[0].any() and without.loa[1].any()
    # Alone or in a batch, matrix products are summed in another order: 7e-7 on one processor, of states around 1.
    np.testing.assert_allclose(without.loa[1], generator.encode_prompts(["wind"]).loa[0], atol=1e-5)
    empty = generator.encode_prompts([""])
    np.testing.assert_allclose(without.text[0, without.text_mask[0].bool()], empty.text[0], atol=1e-5)


def test_loa_is_the_same_without_cache(generator):
    parts = generator.parts
    clap, text, mask = torch.randn(2, 16), torch.randn(2, 5, 24), torch.ones(2, 5, dtype=torch.long)
    loa = generator.loa(clap, text, mask)
    with torch.no_grad():
        prefix = parts.projection_model(clap[:, None], text, mask[:, :1], mask)
        sequence = prefix.hidden_states
        for _ in range(LOA_TOKENS):
            hidden = parts.language_model.transformer(inputs_embeds=sequence, use_cache=False).last_hidden_state
            sequence = torch.cat([sequence, hidden[:, -1:]], dim=1)
    assert loa.shape == (2, LOA_TOKENS, LOA_WIDTH)
    torch.testing.assert_close(loa, sequence[:, -LOA_TOKENS:], atol=1e-5, rtol=1e-4)


def test_speech_zeros_and_words(speaker, phonemes):
    said = [speaker.generate("a man", transcriptions=text, **FEW) for text in ("Hello there.", "Good bye.")]
    assert np.abs(said[0] - said[1]).max() > 1e-5
    assert speaker.encode_prompts(["a man"], ["Hello."]).text is None


# ------------------------------------------------------------------------------------------------ latents and sound


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_every_scheduler_reaches_finite_sound(generator, scheduler):
    steps = []
    waveform = generator.generate("rain", scheduler=scheduler, num_inference_steps=8, progress=lambda *news: steps.append(news))
    assert waveform.dtype == np.float32 and np.isfinite(waveform).all()
    assert steps[-1][0] == steps[-1][1] == len(steps) and len(steps) == 8 + (scheduler == "pndm")  # PNDM asks twice at its first step


@pytest.mark.parametrize("seconds", [0.04, 0.29, 0.333, 1.15, 2.0])
def test_length_is_what_was_asked_for(generator, seconds):
    assert generator.generate("rain", seconds=seconds, num_inference_steps=1).shape == (1, round(seconds * 16_000))


def test_reconstruction_keeps_shapes(generator):
    mel = np.random.default_rng(0).normal(size=(2, 62, 64)).astype(np.float32)
    restored = generator.reconstruct_mel(mel)
    assert restored.shape == mel.shape
    assert generator.reconstruct(mel).shape == (2, 62 * 160)
    parts = generator.parts
    with torch.no_grad():
        whole = torch.from_numpy(mel[:, None, :60])
        expected = parts.vae.decode(parts.vae.encode(whole).latent_dist.mean).sample[:, 0]
    np.testing.assert_allclose(generator.reconstruct_mel(mel[:, :60]), expected, atol=1e-5)


def test_similarity_is_a_cosine(generator):
    waveforms = np.random.default_rng(0).normal(size=(2, 8000)).astype(np.float32)
    found = generator.similarity(["rain", "a dog"], waveforms)
    assert found.shape == (2,) and (np.abs(found) <= 1).all()


def test_bfloat16_is_near(bundle, generator):
    half = AudioGenerator.load(bundle, "cpu", torch.bfloat16)
    exact, near = (g.generate("rain", **FEW) for g in (generator, half))
    assert near.dtype == np.float32 and np.corrcoef(exact[0], near[0])[0, 1] > 0.98


# ------------------------------------------------------------------------------------------------------------ checks


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": [3]}, "a prompt is text, got 3"),
        ({"seconds": 0.0}, "seconds is 0.0; expected at least 0.04"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"num_inference_steps": 1000}, "from 1 to 999"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5"),
        ({"guidance_scale": 1.0, "negative_prompts": "wind"}, "negative prompts need guidance"),
        ({"scheduler": "dim"}, "did you mean 'ddim'"),
        ({"eta": 2.0, "scheduler": "ddim"}, "from 0 to 1"),
        ({"eta": 1.0}, "only the scheduler 'ddim'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": [1, 2]}, "seed has 2 entries for 1 prompts"),
        ({"negative_prompts": ["a", "b"]}, "negative_prompts has 2 entries"),
        ({"num_waveforms_per_prompt": 0}, "at least 1"),
        ({"transcriptions": "hello"}, "makes sounds, not speech"),
        ({"latents": np.zeros((1, 4, 3, 3), np.float32)}, r"\(1, 4, 3, 3\).*\(1, 4, 16, 16\)"),
        ({"unconditional": "ones"}, "zeros, diffusers"),
    ],
)
def test_wrong_arguments_are_explained(generator, wrong, message):
    with pytest.raises(UserError, match=message):
        generator.generate(**({"prompts": "rain"} | wrong))


def test_speech_needs_words(speaker):
    with pytest.raises(UserError, match="give the text to speak"):
        speaker.generate("a man")


def test_long_prompts_are_cut_with_a_warning(generator, caplog):
    generator.generate("rain " * 20, num_inference_steps=1)
    assert "T5 reads 24 tokens and this text has" in caplog.text


def test_unknown_device(bundle):
    with pytest.raises(UserError, match="warp"):
        AudioGenerator.load(bundle, "warp")
