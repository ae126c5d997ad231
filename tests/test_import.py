"""Public weights in: every layout is read to the last tensor, every trap is seen, and nothing a file holds is ever run."""

import json
import math
import os
import pickle
import shutil
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AudioLDM2Pipeline
from original_layout import SCALE, authors_file, authors_unet, authors_vae_decoder, pack
from safetensors.torch import load_file, save_file
from tiny_bundle import make_bundle, roberta_tokenizer, t5_tokenizer
from transformers import GPT2LMHeadModel

import loa
from pipelines import import_weights as job
from stages.audiomae.model import AudioMAE
from stages.bundle import load, read_info
from stages.checkpoints import fold_weight_norm, read_checkpoint, weights_of
from stages.errors import UserError
from stages.files import weights_hash, write_json
from stages.generator import AudioGenerator
from stages.public import laion, layout
from stages.public.original import UNET, parts, structure_of
from stages.variants import VARIANTS, resolve


def import_weights(*arguments, **settings):
    """The job's folder as a path."""
    return job.import_weights(*arguments, **settings).path


# Of a tiny variant's networks those that cost time, narrower still.
SMALL = {
    "diffusion.channels": "[32, 64]",
    "diffusion.heads": "[1, 2]",
    "vae.block_channels": "[8, 8, 16, 16, 32]",
    "vocoder.initial_channels": "32",
}


def small(name):
    return resolve(name, tiny=True, settings=SMALL)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A folder with the two tokenizers that checkpoint files lack."""
    root = tmp_path_factory.mktemp("tokenizers")
    roberta_tokenizer().save_pretrained(root / "tokenizer")
    t5_tokenizer().save_pretrained(root / "tokenizer_2")
    return {"tokenizer": str(root), "tokenizer_2": str(root)}


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory):
    """A whole file of the tiny twin of audioldm2-full, and the networks in it."""
    path = tmp_path_factory.mktemp("original") / "audioldm2-full.pth"
    checkpoint, networks = authors_file(small("audioldm2-full"))
    torch.save(checkpoint, path)
    return path, networks


def changed(path, target, change):
    """A copy of a checkpoint whose weights went through `change`."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, target)
    return target


# ------------------------------------------------------------------------------------ the authors' layout, full size

COUNTS = {  # references.md#parameter-counts; the two tables of 32 rows hold 30 that nobody uses; CLAP and vocoder with buffers
    "text_encoder": 193_913_882,
    "language_model": 124_439_808,
    "vae": 55_376_873,
    "vocoder": 55_264_897,
    "audiomae": 111_656_448,
}
SOUND = {"projection_model": 1_184_256 + 2 * 30 * 768, "text_encoder_2": 341_231_104}
SPEECH = {"projection_model": 604_800 + 2 * 30 * 768, "text_encoder_2": 6_327_744}


@pytest.mark.parametrize(
    ("name", "counts", "tensors"),
    [
        ("audioldm2-full", SOUND | {"unet": 346_943_496}, 1520),
        ("audioldm2-full-large", SOUND | {"unet": 718_012_296}, 3216),
        ("audioldm2-ljs", SPEECH | {"unet": 261_926_536}, 1104),
    ],
)
def test_full_size_files_have_the_published_counts(name, counts, tensors):
    found = {part.folder or part.stage: part for part in parts(resolve(name))}
    assert {part.stage for part in found.values()} == {"clap", "translator", "diffusion", "vae", "vocoder", "audiomae"}
    parameters = {}
    for folder, part in found.items():
        optional = layout.computed(part.places)
        parameters[folder] = sum(math.prod(shape) for key, shape in layout.expected(part.places).items() if key not in optional)
    statistics = 2 * 64  # of CLAP's batch norm: buffers that the checkpoint does hold
    assert parameters == COUNTS | counts | {"text_encoder": COUNTS["text_encoder"] + statistics}
    keys = [key for part in found.values() for key in layout.expected(part.places)]
    assert len(keys) == len(set(keys))
    unet = layout.expected(found["unet"].places)
    assert len(unet) == tensors
    assert len({layout.ema(key.removeprefix(UNET)) for key in unet}) == tensors  # no two names meet without their dots


def test_names_are_those_of_the_published_map():
    """references.md#checkpoint-layout, one of each kind; `audioldm2-full` has three transformers per place, the decoder four levels."""
    found = {part.folder or part.stage: part for part in parts(resolve("audioldm2-full"))}
    pairs = {
        ("unet", "time_embedding.linear_2.bias"): "model.diffusion_model.time_embed.2.bias",
        ("unet", "conv_in.weight"): "model.diffusion_model.input_blocks.0.0.weight",
        ("unet", "down_blocks.0.downsamplers.0.conv.weight"): "model.diffusion_model.input_blocks.3.0.op.weight",
        ("unet", "down_blocks.1.resnets.1.time_emb_proj.weight"): "model.diffusion_model.input_blocks.5.0.emb_layers.1.weight",
        ("unet", "down_blocks.1.attentions.5.proj_in.weight"): "model.diffusion_model.input_blocks.5.3.proj_in.weight",
        ("unet", "down_blocks.3.attentions.1.transformer_blocks.0.attn2.to_k.weight"): (
            "model.diffusion_model.input_blocks.10.2.transformer_blocks.0.attn2.to_k.weight"
        ),
        ("unet", "mid_block.resnets.1.conv2.bias"): "model.diffusion_model.middle_block.4.out_layers.3.bias",
        ("unet", "mid_block.attentions.2.norm.weight"): "model.diffusion_model.middle_block.3.norm.weight",
        ("unet", "up_blocks.0.upsamplers.0.conv.weight"): "model.diffusion_model.output_blocks.2.4.conv.weight",
        ("unet", "up_blocks.1.attentions.4.proj_out.bias"): "model.diffusion_model.output_blocks.4.2.proj_out.bias",
        ("unet", "up_blocks.3.resnets.2.conv_shortcut.weight"): "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        ("unet", "conv_norm_out.weight"): "model.diffusion_model.out.0.weight",
        ("vae", "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"): "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight",
        ("vae", "encoder.down_blocks.0.downsamplers.0.conv.bias"): "first_stage_model.encoder.down.0.downsample.conv.bias",
        ("vae", "decoder.up_blocks.0.resnets.2.norm1.weight"): "first_stage_model.decoder.up.2.block.2.norm1.weight",
        ("vae", "decoder.up_blocks.1.upsamplers.0.conv.bias"): "first_stage_model.decoder.up.1.upsample.conv.bias",
        ("vae", "decoder.mid_block.attentions.0.to_q.weight"): "first_stage_model.decoder.mid.attn_1.q.weight",
        ("vae", "encoder.mid_block.attentions.0.to_out.0.bias"): "first_stage_model.encoder.mid.attn_1.proj_out.bias",
        ("vae", "quant_conv.weight"): "first_stage_model.quant_conv.weight",
        ("vocoder", "upsampler.4.bias"): "first_stage_model.vocoder.ups.4.bias",
        ("vocoder", "resblocks.14.convs2.2.weight"): "first_stage_model.vocoder.resblocks.14.convs2.2.weight",
        ("projection_model", "sos_embed_1"): "cond_stage_models.0.start_of_sequence_tokens.weight",
        ("projection_model", "projection_1.weight"): "cond_stage_models.0.input_sequence_embed_linear.1.weight",
        ("language_model", "transformer.h.3.attn.c_attn.weight"): "cond_stage_models.0.model.h.3.attn.c_attn.weight",
        ("text_encoder", "audio_projection.linear2.bias"): "cond_stage_models.0.cond_stage_models.0.model.audio_projection.2.bias",
        ("text_encoder", "audio_model.audio_encoder.layers.2.blocks.9.attention.self.key.bias"): (
            "cond_stage_models.0.cond_stage_models.0.model.audio_branch.layers.2.blocks.9.attn.qkv.bias"
        ),
        ("text_encoder_2", "encoder.final_layer_norm.weight"): (
            "cond_stage_models.0.cond_stage_models.1.model.encoder.final_layer_norm.weight"
        ),
    }
    assert {pair: found[pair[0]].places[pair[1]].key for pair in pairs} == pairs
    key = found["text_encoder"].places["audio_model.audio_encoder.layers.2.blocks.9.attention.self.key.bias"]
    assert (key.shape, key.part, key.parts) == ((3 * 512,), 1, 3)
    assert found["projection_model"].places["eos_embed_1"][1:] == ((32, 768), 1, 32)
    assert found["vae"].places["decoder.mid_block.attentions.0.to_q.weight"].shape == (512, 512, 1, 1)


@pytest.mark.parametrize("name", ["audioldm2-full", "audioldm2-full-large", "audioldm2-ljs"])
def test_the_authors_wiring_computes_the_same(name):
    """Their networks as their names nest, run plainly from the file, against ours with the weights read from it."""
    variant = small(name)
    variant = replace(variant, vae=replace(variant.vae, mid_attention=True))
    checkpoint, found = authors_file(variant)
    networks = {part.folder: part.network.eval() for part in found}
    generator = torch.Generator().manual_seed(5)
    channels, frames, bins = variant.latent_shape
    noisy, loa = (torch.randn(2, *shape, generator=generator) for shape in ((channels, frames, bins), (8, variant.audiomae.width)))
    text = None if variant.phonemes else torch.randn(2, 5, variant.t5.width, generator=generator)
    extra = {} if text is None else {"encoder_hidden_states_1": text}
    with torch.no_grad():
        ours = networks["unet"](noisy, 321, encoder_hidden_states=loa, **extra).sample
        theirs = authors_unet(checkpoint["state_dict"], noisy, 321, [None, loa, text, None], variant.diffusion.norm_groups)
        assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()
        ours = networks["vae"].decode(noisy).sample
        theirs = authors_vae_decoder(checkpoint["state_dict"], noisy, variant.vae.norm_groups)
        assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()


def test_phoneme_encoders_give_the_references_states(shared):
    from stages.translator.model import PhonemeEncoderConfig

    golden = np.load(shared / "golden" / "phoneme_encoder.npz")
    weights = {key.removeprefix("weights/"): torch.from_numpy(golden[key]) for key in golden.files if key.startswith("weights/")}
    model = PhonemeEncoderConfig(width=48, layers=3, heads=2, feed_forward=96).build().eval().text_encoder
    ours = model.state_dict()
    places = layout.origins(ours, layout.phoneme_encoder)
    assert {key: tuple(value.shape) for key, value in weights.items()} == layout.expected(places)
    model.load_state_dict(layout.take(ours, places, weights))
    mask = torch.from_numpy(golden["mask"]).float()
    with torch.no_grad():
        hidden = model(torch.from_numpy(golden["ids"]).long(), padding_mask=mask[..., None], attention_mask=mask.long()).last_hidden_state
    assert ((hidden - torch.from_numpy(golden["hidden"])).abs().amax(-1) * mask).max() <= 1e-4


# ---------------------------------------------------------------------------------------- the authors' files, tiny


def assert_holds(bundle, networks, left=()):
    """The bundle's components hold the tensors of `networks`, to the bit."""
    for part in networks:
        if part.folder in left:
            continue
        folder = bundle / (part.folder or part.stage)
        weights = load_file(next(folder.glob("*.safetensors")))
        inner = "text_encoder." if part.folder == "text_encoder_2" and read_info(bundle).speech else ""
        for name, tensor in part.tensors.items():
            if inner + name in weights:  # tied copies are stored once
                assert torch.equal(weights[inner + name], tensor), (folder, name)
        assert sum(inner + name in weights for name in part.tensors) >= len(part.tensors) - 1


@pytest.mark.parametrize("name", ["audioldm2-full", "audioldm2-full-large", "audioldm2-ljs"])
def test_authors_files_become_bundles(tmp_path, tokenizers, name):
    variant = small(name)
    checkpoint, networks = authors_file(variant)
    torch.save(checkpoint, tmp_path / "original.pth")
    given = {"tokenizer": tokenizers["tokenizer"]} if variant.phonemes else tokenizers
    bundle = import_weights(str(tmp_path / "original.pth"), tmp_path, variant=name, tiny=True, settings=SMALL, given=given)
    assert_holds(bundle, networks)
    info, heard = read_info(bundle), load(bundle)
    assert (info.variant, info.tiny, info.audio, info.unconditional) == (f"{name}-tiny", True, variant.audio, "zeros")
    assert info.loa_tokens == variant.loa_tokens(variant.translator.pooling) == heard.language_model.config.max_new_tokens
    assert info.provenance["imported"]["sha256"] and info.provenance["weights"] == "raw"
    assert heard.vae.config.scaling_factor == pytest.approx(SCALE, rel=1e-6)
    widths = zip(heard.unet.config.block_out_channels, heard.unet.config.attention_head_dim, strict=True)
    assert [width // heads for width, heads in widths] == [32, 32]  # the authors' channels per head
    assert heard.text_encoder.config.text_config.layer_norm_eps == 1e-5  # RoBERTa's; the class default is 1e-12
    assert AudioMAE.load(bundle / "audiomae").config.width == variant.audiomae.width
    words = {"transcriptions": "Hello there."} if variant.phonemes else {}
    if not words or pytest.importorskip("espeakng_loader"):
        assert np.isfinite(AudioGenerator(heard).generate("rain", num_inference_steps=2, seconds=0.64, **words)).all()


def test_averaged_weights_are_a_choice(tmp_path, sound_file, tokenizers):
    path, networks = sound_file
    bundle = import_weights(
        str(path), tmp_path, tiny=True, settings=SMALL, weights="ema", given=tokenizers
    )  # the variant is the one it looks like
    assert_holds(bundle, networks, left=("unet",))
    raw = next(part.tensors for part in networks if part.folder == "unet")
    averaged = load_file(bundle / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(averaged[name], raw[name] + 0.01) for name in raw)
    assert read_info(bundle).provenance["weights"] == "ema"
    without = changed(path, tmp_path / "bare.pth", lambda s: [s.pop(k) for k in list(s) if k.startswith("model_ema.diffusion")])
    with pytest.raises(UserError, match="no averaged T-UNet.*--weights raw"):
        import_weights(str(without), tmp_path / "bare", tiny=True, settings=SMALL, weights="ema", given=tokenizers)


def test_networks_that_nothing_here_has_are_named(tmp_path, sound_file, tokenizers, caplog):
    """A whole file says nothing; one with a network beside the known ones is read, and what was left out is told."""
    path, networks = sound_file
    import_weights(str(path), tmp_path / "whole", tiny=True, settings=SMALL, given=tokenizers)
    assert caplog.messages == []
    more = changed(path, tmp_path / "more.pth", lambda s: s.update({"style_encoder.0.weight": torch.zeros(2), "lora.up": torch.zeros(1)}))
    assert_holds(import_weights(str(more), tmp_path / "more", tiny=True, settings=SMALL, given=tokenizers), networks)
    (told,) = caplog.messages
    assert "2 weights" in told and "style_encoder.0.weight, lora.up" in told and "left out" in told


def test_second_copies_serve_where_the_first_are_missing(tmp_path, sound_file, tokenizers):
    """Some files hold CLAP only as re-ranker and T5 only at the top level, and no AudioMAE; old vocoders keep their weight norm."""
    path, networks = sound_file
    nested = "cond_stage_models.0.cond_stage_models."

    def move(state):
        for key in list(state):
            if key.startswith(f"{nested}0.model."):
                del state[key]
            elif key.startswith(f"{nested}1.model."):
                state[key.replace(f"{nested}1.", "cond_stage_models.1.")] = state.pop(key)
            elif key.startswith(f"{nested}2."):
                del state[key]
        weight = state.pop("first_stage_model.vocoder.ups.0.weight")
        state["first_stage_model.vocoder.ups.0.weight_g"] = weight.norm(dim=(1, 2), keepdim=True)
        state["first_stage_model.vocoder.ups.0.weight_v"] = 3 * weight

    bundle = import_weights(str(changed(path, tmp_path / "moved.pth", move)), tmp_path, tiny=True, settings=SMALL, given=tokenizers)
    assert not (bundle / "audiomae").exists()
    assert_holds(bundle, [part for part in networks if part.stage not in ("audiomae", "vocoder")])
    told = next(part.tensors for part in networks if part.folder == "vocoder")
    vocoder = load(bundle).vocoder.state_dict()
    assert all(torch.allclose(vocoder[name], told[name], atol=1e-7) for name in told)


@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
def test_weight_norm_is_folded_under_both_its_names(norm):
    layers = torch.nn.ModuleList([norm(torch.nn.Conv1d(3, 4, 5)), norm(torch.nn.ConvTranspose1d(3, 4, 5))])
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
        for layer in layers:
            layer(torch.zeros(1, 3, 9))  # the old kind computes its weight when called
    folded = fold_weight_norm(layers.state_dict())
    assert sorted(folded) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert all(torch.allclose(folded[f"{i}.weight"], layer.weight, atol=1e-6) for i, layer in enumerate(layers))


# ------------------------------------------------------------------------------------------------- what does not fit


def rename(state):
    state["model.diffusion_model.middle_block.0.in_layers.2.wieght"] = state.pop("model.diffusion_model.middle_block.0.in_layers.2.weight")
    state["first_stage_model.quant_conv.bias"] = torch.zeros(3)


def test_misfits_are_named_with_the_nearest(tmp_path, sound_file, tokenizers):
    with pytest.raises(UserError) as error:
        import_weights(str(changed(sound_file[0], tmp_path / "x.pth", rename)), tmp_path, tiny=True, settings=SMALL, given=tokenizers)
    for told in (
        "1 missing (model.diffusion_model.middle_block.0.in_layers.2.weight)",
        "in_layers.2.wieght, nearest model.diffusion_model.middle_block.0.in_layers.2.weight",
        "first_stage_model.quant_conv.bias, [3] instead of [64]",
    ):
        assert told in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pth"]  # nothing half done


def test_long_lists_of_misfits_are_cut(tmp_path, sound_file, tokenizers):
    lost = changed(sound_file[0], tmp_path / "x.pth", lambda s: [s.pop(k) for k in list(s) if k.startswith("first_stage_model.vocoder")])
    with pytest.raises(UserError, match=r"\d\d missing \(.*…\)") as error:
        import_weights(str(lost), tmp_path, tiny=True, settings=SMALL, given=tokenizers)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(("asked", "held"), [("audioldm2-full-large", "audioldm2-full"), ("audioldm2-ljs", "audioldm2-full")])
def test_weights_of_another_variant_say_which(tmp_path, sound_file, tokenizers, asked, held):
    with pytest.raises(UserError, match=f"matches {held} or .*not {asked}(-tiny)?; import it with --variant {held}"):
        import_weights(str(sound_file[0]), tmp_path, variant=asked, tiny=True, settings=SMALL, given=tokenizers)


def test_variants_can_be_told_apart_by_their_structure():
    assert {structure_of(make()) for make in VARIANTS.values()} == {(3, 1), (4, 2), (2, 1)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("scale_factor"), "no scale_factor"),
        (lambda s: s.update(alphas_cumprod=torch.linspace(1, 0, 1000)), "another noise schedule"),
        (lambda s: s.pop("cond_stage_models.0.start_of_sequence_tokens.weight"), "AudioLDM 1, audioldm_48k"),
    ],
)
def test_files_that_would_sound_wrong_are_refused(tmp_path, sound_file, tokenizers, change, told):
    with pytest.raises(UserError, match=told):
        import_weights(str(changed(sound_file[0], tmp_path / "x.pth", change)), tmp_path, tiny=True, settings=SMALL, given=tokenizers)


def test_missing_parts_are_asked_for(tmp_path, sound_file, tokenizers):
    path = str(sound_file[0])
    with pytest.raises(UserError, match="no tokenizer and no tokenizer_2; name --with tokenizer=FOLDER --with tokenizer_2=FOLDER"):
        import_weights(path, tmp_path, tiny=True, settings=SMALL)
    with pytest.raises(UserError, match="unknown part 'vocoder'"):
        import_weights(path, tmp_path, tiny=True, settings=SMALL, given={"vocoder": str(tmp_path)})
    with pytest.raises(UserError, match="no tokenizer could be read there"):
        import_weights(path, tmp_path, tiny=True, settings=SMALL, given=tokenizers | {"tokenizer": str(tmp_path)})
    roberta_tokenizer().train_new_from_iterator([f"word{i}" for i in range(2000)], 1500).save_pretrained(tmp_path / "larger")
    with pytest.raises(UserError, match=r"it has 1\d\d\d tokens, the network knows 1000"):
        import_weights(path, tmp_path, tiny=True, settings=SMALL, given=tokenizers | {"tokenizer": str(tmp_path / "larger")})


def test_other_files_are_not_checkpoints(tmp_path):
    torch.save({"state_dict": {"layer.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="is no known checkpoint.*got layer.weight"):
        import_weights(str(tmp_path / "other.pth"), tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds no weights.*got list"):
        import_weights(str(tmp_path / "list.pth"), tmp_path)
    (tmp_path / "half.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:300])
    with pytest.raises(UserError, match="not a file of plain weights"):
        import_weights(str(tmp_path / "half.pth"), tmp_path)
    for mistyped in ("./nowhere", "nowhere", "checkpoints/audioldm2-full.pth"):  # none of them reaches the network
        with pytest.raises(UserError, match="no such file or folder, and a hub id looks like owner/name"):
            import_weights(mistyped, tmp_path)
    with pytest.raises(UserError, match="owner/name: no such folder, and downloading it from the hub failed"):
        import_weights("owner/name", tmp_path)


# ------------------------------------------------------------------------------------------------ nothing is executed


class Payload:
    """Runs a command when it is unpickled in the ordinary way."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("way", ["zip", "legacy", "pickle"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, sound_file, way):
    trace, path = tmp_path / "executed", tmp_path / "evil.pth"
    content = {"state_dict": {"model.diffusion_model.x": torch.zeros(1)}, "callbacks": Payload(trace)}
    if way == "pickle":
        path.write_bytes(pickle.dumps(content["callbacks"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    result = CliRunner().invoke(loa.main, ["import", str(path), "--work", str(tmp_path / "work")])
    assert result.exit_code == 1 and "not a file of plain weights, so it was not loaded" in result.output
    assert not trace.exists() and not (tmp_path / "work").exists()
    pickle.loads(pickle.dumps(Payload(trace)))  # the payload is real
    assert trace.exists()


def test_the_refused_name_is_told(tmp_path):
    torch.save({"x": Payload(tmp_path / "executed")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"refers to (posix|nt)\.system, which could run code"):
        read_checkpoint(tmp_path / "evil.pth")


def test_harmless_company_of_the_weights_is_left_out(tmp_path, monkeypatch):
    """Lightning's callbacks and NumPy's numbers stand beside public weights; the first are dropped, whatever class they name."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", types.ModuleType("pytorch_lightning.callbacks"))
    callback = module.ModelCheckpoint()
    callback.best = 0.5
    content = {"module.a": torch.arange(3.0), "module.b": torch.ones(1)}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": content, "callbacks": {module.ModelCheckpoint: {"best": np.float64(0.5)}, "live": callback}}, path)
    monkeypatch.delitem(sys.modules, module.__name__)  # a machine without Lightning
    assert torch.equal(weights_of(read_checkpoint(path), path)["a"], torch.arange(3.0))


# ----------------------------------------------------------------------------------------------- diffusers' folders


def make_public(bundle, out):
    """The bundle as the hub would have it: no card, GPT2Model, weights without the head's prefix."""
    shutil.copytree(bundle, out)
    (out / "loa.json").unlink()
    model = GPT2LMHeadModel.from_pretrained(out / "language_model")
    shutil.rmtree(out / "language_model")
    model.transformer.save_pretrained(out / "language_model")
    index = json.loads((out / "model_index.json").read_text())
    write_json(out / "model_index.json", index | {"language_model": ["transformers", "GPT2Model"]})
    return out


def configure(folder, **values):
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | values)


@pytest.mark.parametrize("speech", [False, True])
def test_public_folders_keep_their_sound(tmp_path, speech):
    public = make_public(make_bundle(tmp_path / "mine", speech), tmp_path / "public")
    assert json.loads((public / "language_model" / "config.json").read_text())["architectures"] == ["GPT2Model"]
    bundle = import_weights(str(public), tmp_path / "work")
    info = read_info(bundle)
    assert (info.variant, info.tiny, info.unconditional) == ("audioldm2-ljs-tiny" if speech else "audioldm2-full-tiny", True, "diffusers")
    if speech:
        pytest.importorskip("espeakng_loader")
    said = {"transcriptions": "Hello there."} if speech else {"negative_prompts": "noise"}
    before, after = (AudioGenerator.load(f, "cpu").generate("a dog barks", num_inference_steps=3, **said) for f in (public, bundle))
    assert np.array_equal(before, after) and np.abs(after).max() > 0.01
    AudioLDM2Pipeline.from_pretrained(bundle)  # which the public folder itself no longer serves


def test_round_trip(tmp_path):
    """Exported → imported: the same weights, the same card, the same sound."""
    exported = make_bundle(tmp_path / "exported")
    imported = import_weights(str(exported), tmp_path / "work")
    assert weights_hash(imported) == weights_hash(exported)
    cards = [json.loads((f / "loa.json").read_text()) for f in (exported, imported)]
    assert cards[1].pop("provenance") == cards[0].pop("provenance") | {"imported": {"source": str(exported), "layout": "diffusers"}}
    assert cards[0] == cards[1]
    sounds = [AudioGenerator.load(f, "cpu").generate("a dog barks", num_inference_steps=3) for f in (exported, imported)]
    assert np.array_equal(*sounds)


def test_what_a_folder_says_of_itself_stands(tmp_path):
    """Heads (8 in the public folders), CLAP's ε and the scale factor are part of how those weights sound in diffusers."""
    public = make_public(make_bundle(tmp_path / "mine"), tmp_path / "public")
    configure(public / "unet", attention_head_dim=8)
    told = json.loads((public / "text_encoder" / "config.json").read_text())["text_config"]
    configure(public / "text_encoder", text_config=told | {"layer_norm_eps": 1e-12})
    configure(public / "vae", scaling_factor=0.41)
    parts = load(import_weights(str(public), tmp_path / "work"))
    assert parts.unet.config.attention_head_dim == 8
    assert {m.heads for m in parts.unet.modules() if hasattr(m, "heads")} == {8}
    assert parts.text_encoder.text_model.encoder.layer[0].output.LayerNorm.eps == 1e-12
    assert parts.vae.config.scaling_factor == 0.41


def test_public_speech_folders_speak_at_full_length(tmp_path):
    """They carry the sound models' max_new_tokens of 8; speech has 512 (references.md#public-folders)."""
    public = make_public(make_bundle(tmp_path / "mine", speech=True), tmp_path / "public")
    configure(public / "language_model", max_new_tokens=8)
    bundle = import_weights(str(public), tmp_path / "work")
    assert read_info(bundle).loa_tokens == 512
    assert json.loads((bundle / "language_model" / "config.json").read_text())["max_new_tokens"] == 512


def test_old_weight_files_are_rewritten(tmp_path):
    public = make_public(make_bundle(tmp_path / "mine"), tmp_path / "public")
    unet, clap = public / "unet", public / "text_encoder"
    for folder, old in ((unet, "diffusion_pytorch_model.bin"), (clap, "pytorch_model.bin")):
        new = next(folder.glob("*.safetensors"))
        torch.save(load_file(new), folder / old)
        new.unlink()
    bundle = import_weights(str(public), tmp_path / "work")
    before, after = (AudioGenerator.load(f, "cpu").generate("rain", num_inference_steps=2) for f in (tmp_path / "mine", bundle))
    again = AudioGenerator.load(bundle, "cpu").generate("rain", num_inference_steps=2, unconditional="zeros")
    assert not list(bundle.rglob("*.bin")) and np.array_equal(before, again) and not np.array_equal(before, after)
    torch.save({"x": Payload(tmp_path / "executed")}, unet / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="could run code"):
        import_weights(str(public), tmp_path / "evil")
    assert not (tmp_path / "executed").exists() and not list((tmp_path / "evil").iterdir())


def test_misfits_of_a_folder_are_named(tmp_path):
    public = make_public(make_bundle(tmp_path / "mine"), tmp_path / "public")
    path = public / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    path.unlink()  # shared with the bundle it was copied from
    weights["conv_in.wieght"] = weights.pop("conv_in.weight")
    weights["conv_out.bias"] = torch.zeros(3)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        import_weights(str(public), tmp_path / "work")
    for told in ("unet", "1 missing (conv_in.weight)", "conv_in.wieght, nearest conv_in.weight", "conv_out.bias, [3] instead of [4]"):
        assert told in str(error.value)
    with pytest.raises(UserError, match="matches audioldm2-ljs or .*not audioldm2-full;"):
        import_weights(
            str(make_public(make_bundle(tmp_path / "s", speech=True), tmp_path / "p")), tmp_path / "work", variant="audioldm2-full"
        )


def test_something_else_is_never_replaced_unasked(tmp_path):
    first, other = (make_bundle(tmp_path / name, seed=seed) for name, seed in (("one", 0), ("two", 1)))
    work = tmp_path / "work"
    import_weights(str(first), work)
    with pytest.raises(UserError, match="another bundle.*--force"):
        import_weights(str(other), work)
    assert weights_hash(import_weights(str(other), work, force=True)) == weights_hash(other)


# ------------------------------------------------------------------------------------------------- CLAP and AudioMAE


def packed_clap():
    """A ClapModel of small depth with RoBERTa's width, and the same weights in LAION's layout."""
    config = replace(
        resolve("audioldm2-full").clap,
        text_vocab=300,
        text_layers=1,
        audio_width=16,
        audio_depths=(1, 2),
        audio_heads=(2, 4),
        window_size=4,
    )
    torch.manual_seed(0)
    model = config.build().eval()
    return config, model, pack(model.state_dict(), layout.origins(model.state_dict(), layout.clap))


def test_clap_checkpoints_become_weights_for_a_stage(tmp_path, tokenizers):
    from stages.frozen import TextEncoders

    config, model, state = packed_clap()
    strays = {"audio_branch.tscam_conv.weight": torch.zeros(2), "text_branch.embeddings.position_ids": torch.arange(514)[None]}
    path = tmp_path / "clap.pt"
    torch.save({"epoch": np.int64(15), "name": "clap", "state_dict": {f"module.{k}": v for k, v in (state | strays).items()}}, path)
    result = CliRunner().invoke(loa.main, ["import", str(path), "--work", str(tmp_path), "--with", f"tokenizer={tokenizers['tokenizer']}"])
    assert result.exit_code == 0 and "--with clap=" in result.output, result.output
    folder = tmp_path / "imported" / "clap"
    imported = TextEncoders.load(folder).clap
    assert laion.clap_config(state) == config
    assert all(torch.equal(imported.state_dict()[k], v) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="--force"):
        import_weights(str(path), tmp_path, given={"tokenizer": tokenizers["tokenizer"]})


def test_clap_misfits_are_named():
    _, _, state = packed_clap()
    state["audio_branch.norm.wieght"] = state.pop("audio_branch.norm.weight")
    with pytest.raises(UserError, match="audio_branch.norm.wieght, nearest audio_branch.norm.weight"):
        laion.clap_of(state, "clap.pt")
    with pytest.raises(UserError, match="feature fusion"):
        laion.clap_of(state | {"audio_branch.patch_embed.mel_conv2d.weight": torch.zeros(1)}, "clap.pt")


@pytest.fixture(scope="module")
def laion_weights():
    """Random weights of laion-clap's own classes: HTSAT-tiny and a shallow RoBERTa."""
    try:
        module = laion.package()
    except UserError as error:
        pytest.skip(str(error))
    sizes = replace(resolve("audioldm2-full").clap, text_vocab=300, text_layers=1, audio_width=96, audio_depths=(2, 2, 6, 2))
    torch.manual_seed(0)
    start = sizes.build()
    state = pack(start.state_dict(), layout.origins(start.state_dict(), layout.clap))
    model = laion.original(state)
    assert type(model).__module__ == module.__name__
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):  # not its fixed front end
            parameter.add_(0.05 * torch.randn(parameter.shape))
        model.audio_branch.bn0.running_mean.fill_(-30.0)
        model.audio_branch.bn0.running_var.fill_(200.0)
    return model.state_dict()


def test_same_clap_weights_same_embeddings_in_both_packages(laion_weights):
    assert max(laion.disagreement(laion_weights).values()) <= 1e-5
    slip = {key: value.roll(len(value) // 3, 0) for key, value in laion_weights.items() if key.endswith("attn.qkv.weight")}
    right, wrong = (laion.clap_of(weights, "x") for weights in (laion_weights, laion_weights | slip))  # q, k and v in others' places
    mel = 20 * torch.randn(1, 1, 1001, 64) - 30
    with torch.no_grad():
        told, other = (model.get_audio_features(input_features=mel).pooler_output for model in (right, wrong))
    assert (told - other).abs().max() > 1e-4  # so the measure would see such a slip


@pytest.mark.parametrize("decoder", ["swin", "global"])
def test_audiomae_checkpoints_become_weights_for_a_stage(tmp_path, decoder):
    config = replace(resolve("audioldm2-full", tiny=True).audiomae, decoder=decoder, decoder_depth=3)
    network = AudioMAE(config)
    torch.save({"model": network.state_dict(), "epoch": 32}, tmp_path / "pretrained.pth")
    folder = import_weights(str(tmp_path / "pretrained.pth"), tmp_path, tiny=True)
    loaded = AudioMAE.load(folder)
    assert folder == tmp_path / "imported" / "audiomae" and loaded.config == config
    fbank = torch.randn(1, config.frames, config.bins)
    assert torch.equal(loaded.features(fbank), network.features(fbank))
