"""LoRA adapters of T-UNet and GPT-2: PEFT reads what loa writes, and they sound the same merged and unmerged."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AudioLDM2Pipeline
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2LMHeadModel

import loa
from pipelines.export import export_merged
from stages.base import Stage, stage_class
from stages.bundle import load, read_info
from stages.errors import UserError
from stages.files import Place
from stages.generator import AudioGenerator
from stages.lora import CONFIG, WEIGHTS, Adapter, adapter_folders, attach, save_adapters
from stages.variants import resolve

RANK = 4
SETTINGS: dict[str, Any] = {"seed": 3, "num_inference_steps": 4}


class Pair(Stage):
    """The two networks of a bundle that have adapters."""

    name = "pair"

    def __init__(self, bundle: Path) -> None:
        super().__init__()
        parts = load(bundle)
        self.unet, self.language_model = parts.unet, parts.language_model

    def homes(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "language_model": self.language_model}


@pytest.fixture(scope="module")
def trained(bundle: Path) -> Pair:
    """As after a training: both matrices of every adapter say something."""
    pair = Pair(bundle)
    attach(pair, RANK)
    torch.manual_seed(5)
    for name, parameter in pair.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return pair.eval()


@pytest.fixture(scope="module")
def adapters(trained: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "joint"
    save_adapters(trained, folder)
    return folder


@pytest.fixture(scope="module")
def merged(bundle: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_merged(bundle, [Adapter(str(adapters))], tmp_path_factory.mktemp("merged") / "bundle").path


def predicted(unet: Any) -> torch.Tensor:
    """What a T-UNet says of some noise."""
    g = torch.Generator().manual_seed(0)
    states = {"encoder_hidden_states": torch.randn(1, 4, 32, generator=g), "encoder_hidden_states_1": torch.randn(1, 5, 24, generator=g)}
    noisy = torch.randn(1, 4, 16, 16, generator=g)
    with torch.no_grad():
        out: torch.Tensor = unet(noisy, torch.tensor([500]), encoder_attention_mask_1=torch.ones(1, 5).long(), **states).sample
    return out


def written(language_model: Any) -> torch.Tensor:
    with torch.no_grad():
        states = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
        out: torch.Tensor = language_model.transformer(inputs_embeds=states).last_hidden_state
    return out


# -------------------------------------------------------------------------------------------------------- in training


def test_fresh_adapters_change_nothing_and_are_all_that_is_trained(bundle: Path) -> None:
    pair = Pair(bundle)
    before = predicted(pair.unet), written(pair.language_model)
    attach(pair, RANK)
    assert torch.equal(predicted(pair.unet), before[0]) and torch.equal(written(pair.language_model), before[1])
    moved = {name for name, parameter in pair.named_parameters() if parameter.requires_grad}
    assert moved == {name for name, _ in pair.named_parameters() if ".lora_" in name} and len(moved) > 40
    assert all(parameter.shape[0 if "lora_A" in name else 1] == RANK for name, parameter in pair.named_parameters() if name in moved)


def test_every_attention_of_both_networks_is_adapted(adapters: Path, bundle: Path) -> None:
    names = {name: set(load_file(folder / WEIGHTS)) for name, folder in adapter_folders(adapters).items()}
    unet = AudioLDM2UNet2DConditionModel.from_pretrained(bundle / "unet")
    linear = {n for n, m in unet.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks" in n}
    assert names["unet"] == {f"base_model.model.{n}.lora_{x}.weight" for n in linear for x in "AB"}
    assert len(names["language_model"]) == 2 * 4 * 2  # two layers; attention in and out, and two of the perceptron; A and B


def test_stages_without_these_networks_have_no_adapters() -> None:
    variant = resolve("audioldm2-full", tiny=True)
    with pytest.raises(UserError, match="vae has neither T-UNet nor GPT-2"):
        attach(stage_class("vae").build(variant, Path), RANK)


# ---------------------------------------------------------------------------------------------------- as PEFT has them


def test_peft_reads_them_on_the_networks_of_diffusers_and_transformers(trained: Pair, adapters: Path, bundle: Path) -> None:
    unet = AudioLDM2UNet2DConditionModel.from_pretrained(bundle / "unet")
    before = predicted(unet)
    adapted = predicted(PeftModel.from_pretrained(unet, str(adapters / "unet")))
    torch.testing.assert_close(adapted, predicted(trained.unet), atol=1e-5, rtol=1e-4)
    assert float((adapted - before).abs().max()) > 0.01
    gpt = GPT2LMHeadModel.from_pretrained(bundle / "language_model").eval()
    model = PeftModel.from_pretrained(gpt, str(adapters / "language_model"))
    torch.testing.assert_close(written(model.base_model.model), written(trained.language_model), atol=1e-5, rtol=1e-4)
    config = json.loads((adapters / "unet" / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["auto_mapping"]["base_model_class"]) == ("LORA", 4, "AudioLDM2UNet2DConditionModel")


# ------------------------------------------------------------------------------------------------------------- in use


def test_generating_with_adapters_equals_generating_with_the_merged_bundle(
    generator: AudioGenerator, bundle: Path, adapters: Path, merged: Path
) -> None:
    """And with PEFT's own layers, unmerged, in the same networks."""
    plain = generator.generate("rain", **SETTINGS)
    applied = AudioGenerator.load(bundle, "cpu", adapters=[Adapter(str(adapters))]).generate("rain", **SETTINGS)
    from_merged = AudioGenerator.load(merged, "cpu").generate("rain", **SETTINGS)
    np.testing.assert_allclose(applied, from_merged, atol=1e-5)
    unmerged = load(bundle)
    for name in ("unet", "language_model"):
        PeftModel.from_pretrained(getattr(unmerged, name), str(adapters / name))  # puts its layers into the network itself
    np.testing.assert_allclose(AudioGenerator(unmerged).generate("rain", **SETTINGS), applied, atol=1e-4)
    assert float(np.abs(applied - plain).max()) > 0.01


def test_scale_zero_is_the_bundle_itself_and_scales_add_up(generator: AudioGenerator, bundle: Path, adapters: Path) -> None:
    def sound(*scales: float) -> np.ndarray:
        chosen = [Adapter(str(adapters), scale) for scale in scales]
        return AudioGenerator.load(bundle, "cpu", adapters=chosen).generate("rain", **SETTINGS)

    plain = generator.generate("rain", **SETTINGS)
    whole = sound(1.0)
    assert np.array_equal(sound(0.0), plain)
    np.testing.assert_allclose(sound(1.5, -0.5), whole, atol=1e-4)
    assert float(np.abs(sound(0.5) - whole).max()) > 0.001


def test_a_merged_bundle_is_one_for_diffusers(trained: Pair, merged: Path, bundle: Path) -> None:
    pipeline = AudioLDM2Pipeline.from_pretrained(merged)
    torch.testing.assert_close(predicted(pipeline.unet), predicted(trained.unet), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(written(pipeline.language_model), written(trained.language_model), atol=1e-5, rtol=1e-4)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.score_waveforms = lambda text, audio, **_: audio
    theirs = pipeline("rain", num_inference_steps=2, generator=[torch.Generator().manual_seed(3)]).audios
    ours = AudioGenerator.load(merged, "cpu").generate("rain", seed=3, num_inference_steps=2, profile="diffusers")
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    one, two = read_info(bundle), read_info(merged)
    assert (one.variant, one.audio, one.loa_tokens) == (two.variant, two.audio, two.loa_tokens)
    for name in ("vae", "vocoder", "text_encoder", "projection_model"):
        files = [load_file(next((folder / name).glob("*.safetensors"))) for folder in (bundle, merged)]
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_one_network_alone(generator: AudioGenerator, bundle: Path, adapters: Path) -> None:
    """A single folder of PEFT's serves, and says by itself or by its name which network it adapts."""
    assert adapter_folders(adapters / "unet") == {"unet": adapters / "unet"}
    sounds = [AudioGenerator.load(bundle, "cpu", adapters=[Adapter(str(adapters / name))]) for name in ("unet", "language_model")]
    first, second = (each.generate("rain", **SETTINGS) for each in sounds)
    assert float(np.abs(first - second).max()) > 0.001


# ---------------------------------------------------------------------------------------------------- what goes wrong


def changed(adapters: Path, out: Path, **config: Any) -> Path:
    shutil.copytree(adapters, out)
    path = out / "unet" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return out


def test_what_is_no_adapter_is_refused(bundle: Path, adapters: Path, tmp_path: Path) -> None:
    def load_with(folder: Path) -> None:
        load(bundle, adapters=[Adapter(str(folder))])

    with pytest.raises(UserError, match=r"--lora .*: there are no adapters \(no adapter_config.json in it, nor in unet or language_model"):
        load_with(tmp_path)
    with pytest.raises(UserError, match="adapters of the type LOHA, and loa applies LORA"):
        load_with(changed(adapters, tmp_path / "loha", peft_type="LOHA"))
    nameless = changed(adapters, tmp_path / "nameless", auto_mapping=None) / "unet"
    shutil.move(nameless, tmp_path / "mine")
    with pytest.raises(UserError, match="does not say which network it adapts; put the folder into one called unet or language_model"):
        load_with(tmp_path / "mine")
    torn = changed(adapters, tmp_path / "torn")
    (torn / "unet" / WEIGHTS).write_bytes((torn / "unet" / WEIGHTS).read_bytes()[:500])
    with pytest.raises(UserError, match="does not fit this bundle, or is damaged"):
        load_with(torn)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_adapters_of_another_bundle_are_refused(bundle: Path, adapters: Path, tmp_path: Path) -> None:
    fewer, wider = changed(adapters, tmp_path / "fewer"), changed(adapters, tmp_path / "wider")
    weights = load_file(fewer / "unet" / WEIGHTS)
    gone = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != gone}, fewer / "unet" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"1 matrices are missing, such as {gone}"):
        load(bundle, adapters=[Adapter(str(fewer))])
    weights[gone] = torch.cat([weights[gone], weights[gone]], 1)
    save_file(weights, wider / "unet" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not fit this bundle.*size mismatch.*give the bundle that it was trained on with --bundle"):
        load(bundle, adapters=[Adapter(str(wider))])


def test_how_a_scale_is_written(tmp_path: Path) -> None:
    assert Adapter.of("mine") == Adapter("mine", 1.0)
    assert Adapter.of("mine=0.5") == Adapter("mine", 0.5) and Adapter.of("mine=-1") == Adapter("mine", -1.0)
    (tmp_path / "rank=4").mkdir()
    assert Adapter.of(str(tmp_path / "rank=4")) == Adapter(str(tmp_path / "rank=4"), 1.0)
    for text in ("mine=loud", "mine=", "=0.5", "mine=nan"):
        with pytest.raises(UserError, match="expected FOLDER or FOLDER=SCALE"):
            Adapter.of(text)


def test_commands_know_what_adapters_were_trained_on(bundle: Path, adapters: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """`loa generate` and `loa export` take that bundle, and the first says so where it is another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOA_BUNDLE", raising=False)
    mine = changed(adapters, tmp_path / "mine")
    weights = json.loads((bundle / "loa.json").read_text())["weights"]
    card = {"stage": "joint", "made_from": {"start": {"from": str(bundle), "weights": weights}}}
    (mine / "stage.json").write_text(json.dumps(card))
    assert Adapter("mine").trained_on() == Place.of(bundle) and Adapter("mine").fits(Place.of(bundle))

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(loa.main, arguments)
        assert result.exit_code == 0, result.output
        return result.output

    assert "trained on other weights" not in run("generate", "rain", "--lora", "mine=0.5", "--steps", "2", "-o", "one.wav")
    assert "merged: audioldm2-full-tiny" in run("export", "--work", ".", "--lora", "mine", "--out", "merged")
    weights = json.loads((tmp_path / "merged" / "loa.json").read_text())
    assert weights["provenance"]["merged"][0] == {"folder": "mine", "scale": 1.0, "card": card}
    said = run("generate", "rain", "--lora", "mine", "--bundle", "merged", "--steps", "2", "-o", "two.wav")
    assert "mine was trained on other weights than those of merged" in said
    refused = CliRunner().invoke(loa.main, ["export", "--lora", "mine", "--with", "vae=x"])
    assert refused.exit_code == 1 and "leave --with, --variant, --no-joint and --critics out" in refused.output
