"""`loa selfcheck`: what it says of whole weights and of damaged ones."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import loa
from pipelines import selfcheck as checks
from pipelines.selfcheck import MEASURES, NO_NUMBER, PUBLISHED, SOUND, Line, selfcheck
from stages.sizes import networks, parameters
from stages.variants import resolve

REPO = Path(__file__).resolve().parent.parent


def damaged(bundle: Path, out: Path, name: str, change: str) -> Path:
    """A copy with one component of other weights: one tensor is "nan" or "gone", or those whose names begin with `change` are zero."""
    shutil.copytree(bundle, out)
    path = next((out / name).glob("*.safetensors"))
    weights = load_file(path)
    path.unlink()
    first = next(key for key, value in weights.items() if value.is_floating_point() and value.ndim > 1)
    if change == "gone":
        del weights[first]
    elif change == "nan":
        weights[first] = torch.full_like(weights[first], torch.nan)
    else:
        weights = {key: torch.zeros_like(value) if key.startswith(change) else value for key, value in weights.items()}
    save_file(weights, path, metadata={"format": "pt"})
    return out


def failing(source: Path) -> list[Line]:
    return [line for line in selfcheck(str(source), steps=2, device="cpu") if line.fault]


# ----------------------------------------------------------------------------------------------- what is known of them


def test_published_counts_are_those_of_the_references_and_of_our_networks() -> None:
    page = (REPO / "docs" / "references.md").read_text(encoding="utf-8")
    said = {int(number.replace(",", "")) for number in re.findall(r"\d{1,3}(?:,\d{3})+", page.partition("### Parameter counts")[2])}
    for name, counts in PUBLISHED.items():
        assert set(counts) == set(SOUND) and set(counts.values()) <= said, name
        built = networks(resolve(name))
        assert counts["unet"] == parameters(built["diffusion"]) and counts["vae"] == parameters(built["vae"])
        assert counts["vocoder"] == parameters(built["vocoder"]) and counts["text_encoder"] == parameters(built["clap"])
        translator = built["translator"]
        assert counts["projection_model"] == parameters(translator.projection_model)
        assert counts["language_model"] == parameters(translator.language_model)
        speech = translator.phoneme_model
        assert counts["text_encoder_2"] == parameters(built["t5"] if speech is None else speech.text_encoder)


def test_published_weights_are_judged_and_others_are_not(monkeypatch: pytest.MonkeyPatch, generator) -> None:
    assert {line.expected for line in checks._counts(generator.parts)} == {NO_NUMBER}
    right = {line.what.removeprefix("parameters of "): int(line.found.replace(",", "")) for line in checks._counts(generator.parts)}
    monkeypatch.setitem(PUBLISHED, generator.info.variant, right)
    assert [line.fault for line in checks._counts(generator.parts)] == [""] * len(SOUND)
    monkeypatch.setitem(PUBLISHED, generator.info.variant, right | {"vae": 7})
    (wrong,) = [line for line in checks._counts(generator.parts) if line.fault]
    assert wrong.text().startswith("FAIL parameters of vae: expected 7, found ") and "the published one 7" in wrong.fault


@pytest.mark.parametrize(
    ("loss", "published", "good"), [(0.4, True, True), (1.2, True, False), (1.2, False, True), (float("nan"), False, False)]
)
def test_losses_of_published_weights_must_beat_the_naive_one(loss: float, published: bool, good: bool) -> None:
    line = checks._loss_line("diffusion", loss, 1.0, published)
    assert (not line.fault) == good and ("by zeros" in line.expected)


# ------------------------------------------------------------------------------------------------------ whole, damaged


@pytest.mark.slow
def test_a_whole_bundle_is_as_expected(learned: Path) -> None:
    result = CliRunner().invoke(loa.main, ["selfcheck", str(learned), "--steps", "4", "--device", "cpu"])
    print(result.output)
    assert result.exit_code == 0 and result.output.rstrip().endswith("all as expected")
    assert "FAIL" not in result.output and result.output.count(NO_NUMBER) >= len(SOUND) + len(MEASURES)
    for stage, part in (("clap", "towers"), ("audiomae", "audiomae"), ("vae", "discriminator"), ("vae", "autoencoder")):
        assert f"training {stage}: gradient of {part}: expected in all of" in result.output
    for stage in MEASURES:
        assert f"training {stage}: {MEASURES[stage].log}: expected a finite number" in result.output
    assert "one denoising step in plain diffusers: expected at most 0.001 apart" in result.output


@pytest.mark.slow
def test_damaged_bundles_fail_with_a_sentence(learned: Path, tmp_path: Path) -> None:
    (lost,) = failing(damaged(learned, tmp_path / "gone", "vae", "gone"))
    assert lost.what == "import" and "1 missing" in lost.fault
    faults = [line.fault for line in failing(damaged(learned, tmp_path / "nan", "unet", "nan"))]
    assert "the sound holds NaN or infinity: weights are damaged" in faults
    assert any(fault.startswith("the loss of diffusion is nan") for fault in faults)
    assert any(fault.startswith("no finite gradient reaches") for fault in faults)
    result = CliRunner().invoke(loa.main, ["selfcheck", str(damaged(learned, tmp_path / "zero", "vocoder", "conv_post")), "--steps", "2"])
    assert result.exit_code == 1 and "Error: the generated sound is silent" in result.output
    assert "all as expected" not in result.output


def test_what_is_nowhere_fails(tmp_path: Path) -> None:
    result = CliRunner().invoke(loa.main, ["selfcheck", str(tmp_path / "nowhere")])
    assert result.exit_code == 1 and "Error: " in result.output and "there is no such file or folder" in result.output
