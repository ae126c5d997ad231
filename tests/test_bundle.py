"""Bundles: what `assemble` writes is whole, loads in diffusers, and everything wrong with one is said plainly."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_bundle import AUDIO, LOA_TOKENS, SCALE, make_bundle, write_stages

from pipelines.export import export
from stages.base import read_card
from stages.bundle import assemble, find_bundle, load, read_info
from stages.config import to_dict
from stages.errors import UserError
from stages.files import Place, write_json
from stages.variants import resolve

META = {"variant": "audioldm2-full", "tiny": True, "audio": AUDIO, "provenance": {"made_by": "tests"}}


def stages_of(bundle):
    return {folder.name: folder for folder in bundle.with_name(bundle.name + "-stages").iterdir()}


def test_the_card_says_what_the_bundle_is(bundle):
    info = read_info(bundle)
    assert (info.variant, info.tiny, info.speech, info.audio) == ("audioldm2-full-tiny", True, False, AUDIO)
    assert (info.loa_tokens, info.unconditional) == (LOA_TOKENS, "zeros")
    assert info.provenance == {"made_by": "tests"}


def test_diffusion_scale_and_loa_length_reach_the_configurations(bundle):
    parts = load(bundle)
    assert parts.vae.config.scaling_factor == pytest.approx(SCALE)
    assert parts.language_model.config.max_new_tokens == LOA_TOKENS
    assert json.loads((stages_of(bundle)["vae"] / "vae" / "config.json").read_text())["scaling_factor"] == 1.0  # the stage is untouched


def test_loaded_weights_are_the_written_ones(bundle):
    written = load_file(stages_of(bundle)["diffusion"] / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = load(bundle).unet.state_dict()
    assert written.keys() == loaded.keys() and all(torch.equal(written[k], loaded[k]) for k in written)


def test_dtype_leaves_decoder_in_float32(bundle):
    parts = load(bundle, dtype=torch.bfloat16)
    assert {parts.unet.dtype, parts.language_model.dtype, parts.text_encoder.dtype, parts.projection_model.dtype} == {torch.bfloat16}
    assert {parts.vae.dtype, parts.vocoder.dtype} == {torch.float32}


def test_tokenizers_survive_saving(bundle):
    from tiny_bundle import roberta_tokenizer, t5_tokenizer

    parts = load(bundle)
    for reloaded, fresh in ((parts.tokenizer, roberta_tokenizer()), (parts.tokenizer_2, t5_tokenizer())):
        assert reloaded("a dog barks").input_ids == fresh("a dog barks").input_ids
        assert reloaded.model_max_length == fresh.model_max_length


@pytest.mark.parametrize("name", ["model.bin", "weights.pt", "state.pkl"])
def test_nothing_that_could_run_code_gets_in(tmp_path, name):
    stages = write_stages(tmp_path / "stages")
    (stages["diffusion"] / "unet" / name).write_bytes(b"\x80\x04.")
    out = assemble(stages, tmp_path / "bundle", META)
    assert not [p for p in out.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_same_stages_again_are_no_conflict_but_others_are(tmp_path):
    out = make_bundle(tmp_path / "bundle")
    assemble(stages_of(out), out, META | {"provenance": {"made_by": "somebody else"}})
    other = write_stages(tmp_path / "other", seed=1)
    before = (out / "loa.json").read_bytes()
    with pytest.raises(UserError, match="another bundle.*--force"):
        assemble(other, out, META)
    assert (out / "loa.json").read_bytes() == before
    assemble(other, out, META, force=True)
    assert (out / "loa.json").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "bundle-stages", "other"]  # no drafts left behind


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path):
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "song.wav").write_bytes(b"x")
    with pytest.raises(UserError, match="not a bundle"):
        assemble(write_stages(tmp_path / "stages"), tmp_path / "music", META, force=True)
    assert (tmp_path / "music" / "song.wav").exists()


def test_missing_stage_is_named_with_its_command(tmp_path):
    stages = write_stages(tmp_path / "stages")
    del stages["vocoder"]
    with pytest.raises(UserError, match="vocoder.*loa train vocoder"):
        assemble(stages, tmp_path / "bundle", META)
    assert not (tmp_path / "bundle").exists()


def test_stages_of_different_systems_are_refused(tmp_path):
    from diffusers import AutoencoderKL

    stages = write_stages(tmp_path / "stages")
    shutil.rmtree(stages["vae"])
    AutoencoderKL(latent_channels=6, block_out_channels=(8,), norm_num_groups=4).save_pretrained(stages["vae"] / "vae")
    with pytest.raises(UserError, match="latent channels is 4, the VAE's is 6"):
        assemble(stages, tmp_path / "bundle", META)


def test_joint_replaces_translator_and_diffusion(tmp_path):
    stages = write_stages(tmp_path / "stages")
    joint = write_stages(tmp_path / "joint", seed=5)
    for part in joint["diffusion"].iterdir():
        shutil.move(part, joint["translator"] / part.name)
    out = assemble(stages | {"joint": joint["translator"]}, tmp_path / "bundle", META)
    ours = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    theirs = load_file(joint["translator"] / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_another_format_is_refused_with_both_numbers(tmp_path):
    out = make_bundle(tmp_path / "bundle")
    write_json(out / "loa.json", json.loads((out / "loa.json").read_text()) | {"format": 99})
    with pytest.raises(UserError, match="format 99.*reads 1"):
        load(out)


@pytest.mark.parametrize("lost", ["unet/diffusion_pytorch_model.safetensors", "tokenizer_2/tokenizer_config.json", "vocoder/config.json"])
def test_lost_parts_are_named(tmp_path, lost):
    out = make_bundle(tmp_path / "bundle")
    (out / lost).unlink()
    with pytest.raises(UserError, match=f"lacks {lost}"):
        load(out)


def test_damaged_and_incomplete_weights_are_noticed(tmp_path):
    from safetensors.torch import save_file

    out = make_bundle(tmp_path / "bundle")
    path = out / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    path.unlink()  # shared with the stage: never written in place
    path.write_bytes(b"not weights at all")
    with pytest.raises(UserError, match="unet are damaged"):
        load(out)
    save_file(dict(list(weights.items())[1:]), path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="incomplete: 1 are missing"):
        load(out)


def test_public_folders_are_bundles(tmp_path):
    """No loa.json, language model named GPT2Model: what is found on the hub (references.md#public-folders)."""
    out = make_bundle(tmp_path / "somebody-audioldm2")
    (out / "loa.json").unlink()
    index = json.loads((out / "model_index.json").read_text())
    write_json(out / "model_index.json", index | {"language_model": ["transformers", "GPT2Model"]})
    info = load(out).info
    assert (info.variant, info.unconditional, info.loa_tokens) == ("somebody-audioldm2", "diffusers", LOA_TOKENS)
    assert (info.audio.sample_rate, info.audio.hop_length, info.audio.clip_seconds) == (16_000, 160, 0.64)


def test_other_folders_are_not(tmp_path):
    with pytest.raises(UserError, match="there is no bundle at"):
        read_info(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no model_index.json"):
        read_info(tmp_path)
    write_json(tmp_path / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    with pytest.raises(UserError, match="StableDiffusionPipeline"):
        read_info(tmp_path)


def test_find_bundle_takes_the_newest(tmp_path, monkeypatch):
    import os

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOA_BUNDLE", raising=False)
    with pytest.raises(UserError, match="loa demo"):
        find_bundle(None)
    for age, name in ((100, "outputs/bundle"), (50, "outputs/speech/bundle"), (200, "outputs/old/bundle")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        write_json(folder / "model_index.json", {})
        os.utime(folder, (2e9 - age, 2e9 - age))
    assert find_bundle(None) == Place.of("outputs/speech/bundle")
    monkeypatch.setenv("LOA_BUNDLE", "elsewhere")
    assert find_bundle(None) == Place.of("elsewhere")
    assert find_bundle(tmp_path) == Place.of(tmp_path)


def release_all(work, variant):
    """The random stages, released by a project of `variant`."""
    for name, folder in write_stages(work / "stages").items():
        write_json(folder / "stage.json", {"format": 1, "stage": name, "variant": variant.name, "config": to_dict(variant), "steps": 3})
        read_card(folder, name)


def test_export_gathers_a_project(tmp_path):
    variant = resolve("audioldm2-ac", tiny=True)
    release_all(tmp_path, variant)
    out = export(tmp_path)
    info = read_info(out)
    assert out.path == tmp_path / "bundle"
    assert (info.variant, info.tiny, info.audio) == ("audioldm2-ac-tiny", True, variant.audio)
    assert info.provenance["stages"]["diffusion"]["steps"] == 3
    assert len(info.provenance["stages"]["vae"]["weights"]) == 64
    assert export(tmp_path, variant) == out


def test_export_refuses_stages_of_other_sound(tmp_path):
    release_all(tmp_path, resolve("audioldm2-ac", tiny=True))
    card = json.loads((tmp_path / "stages" / "vae" / "stage.json").read_text())
    card["config"]["audio"]["sample_rate"] = 48_000
    write_json(tmp_path / "stages" / "vae" / "stage.json", card)
    with pytest.raises(UserError, match="vae was trained with other audio settings.*sample_rate: was 48000, now 16000"):
        export(tmp_path)


def test_export_takes_given_folders(tmp_path):
    release_all(tmp_path, resolve("audioldm2-ac", tiny=True))
    other = write_stages(tmp_path / "other", seed=9)
    out = export(tmp_path, given={"vocoder": str(other["vocoder"])}, out=tmp_path / "mixed")
    ours, theirs = (load_file(f / "vocoder" / "model.safetensors") for f in (out, other["vocoder"]))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert read_info(out).provenance["stages"]["vocoder"]["folder"] == str(other["vocoder"])


def test_export_without_stages_says_what_to_train(tmp_path):
    with pytest.raises(UserError, match="loa train|variant is unknown"):
        export(tmp_path)


def test_a_tiny_system_is_never_shown_as_the_full_one(bundle, tmp_path):
    """Cards of earlier versions say "audioldm2-full" and "tiny" apart; both are read, and are the same bundle."""
    assert json.loads((bundle / "loa.json").read_text())["variant"] == "audioldm2-full-tiny"
    old = tmp_path / "bundle"
    shutil.copytree(bundle, old)
    card = json.loads((old / "loa.json").read_text())
    (old / "loa.json").write_text(json.dumps(card | {"variant": "audioldm2-full"}))
    assert read_info(old) == read_info(bundle)
    assert resolve(read_info(old).variant) == resolve("audioldm2-full", tiny=True)
