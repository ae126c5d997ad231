"""A bundle learns from recordings of one's own: adapters in training, and `loa finetune` from recordings to a bundle."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_store import largest_difference, make_store, small, weights

import loa
from pipelines.evaluation.clips import Selection
from pipelines.evaluation.run import evaluate
from pipelines.finetune import Plan, finetune
from pipelines.train import train_stage
from pipelines.weights import frozen_of, variant_of
from stages.audio import write_wav
from stages.base import read_card
from stages.errors import UserError
from stages.files import weights_hash
from stages.lora import CONFIG, WEIGHTS, adapter_folders

# At the stage's own rate adapters move little in so few steps.
PLAN = Plan(rank=8, steps=40, settings={"recipes.joint.learning_rate": "5e-3", "recipes.joint.global_batch": "4"})


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whistles that rise, which the bundle has never heard, with captions; every fourth is held out."""
    folder, rate, rng = tmp_path_factory.mktemp("mine"), 16_000, np.random.default_rng(7)
    rows = ["file,caption,split"]
    for i in range(24):
        t = np.arange(int(2.56 * rate)) / rate
        sound = (
            0.5 * np.sin(2 * np.pi * (rng.uniform(500, 900) * t + rng.uniform(300, 500) * t**2)) * np.minimum(1, 4 * np.abs(np.sin(9 * t)))
        )
        write_wav(folder / f"{i:02d}.wav", sound.astype(np.float32), rate)
        rows.append(f"{i:02d}.wav,a whistle that rises,{'validation' if i % 4 == 0 else 'train'}")
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def tuned(learned: Path, recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The work folder, and what came of `finetune` with adapters."""
    work = tmp_path_factory.mktemp("tuned")
    return work, finetune([recordings], learned, work, PLAN, workers=0, precision="fp32")


@pytest.mark.slow
def test_the_finetuned_bundle_is_nearer_to_the_new_recordings(learned: Path, tuned: Any) -> None:
    """By the losses of recordings that were held out; six clips are too few for the Fréchet distance, which is printed."""
    work, done = tuned
    print(done.table())
    assert set(done.before) == set(done.after) == {"noise", "loa"}
    assert done.after["loa"] < 0.9 * done.before["loa"]
    assert done.after["noise"] < 1.005 * done.before["noise"]  # a VAE of eight steps leaves its T-UNet little to learn
    for name, bundle in (("before", learned), ("after", done.bundle)):
        settings = {"num_inference_steps": 10}
        evaluation = evaluate(work / name, Selection(6), settings, bundle=bundle, store=str(work / "store"), device="cpu")
        print(name, "Fréchet distance (CLAP)", evaluation.scores["frechet_clap"]["generated"])
    assert "held-out recordings" in done.table()


@pytest.mark.slow
def test_adapters_are_released_and_the_bundle_they_began_with_stays(learned: Path, tuned: Any) -> None:
    work, done = tuned
    assert done.released.path == work / "adapters" / "joint" and not (work / "stages").exists()
    assert set(adapter_folders(done.released)) == {"unet", "language_model"}
    for folder in adapter_folders(done.released).values():
        assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}
    card = read_card(done.released, "joint")
    assert card["lora"] == 8 and card["made_from"]["start"] == {"from": str(learned), "weights": weights_hash(learned)}
    changed = {name.split("/")[0] for name, tensor in weights(done.bundle.path).items() if not tensor.equal(weights(learned)[name])}
    assert changed == {"unet", "language_model"}


@pytest.mark.slow
def test_the_same_command_again_finds_it_done(learned: Path, recordings: Path, tuned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    work, done = tuned

    def never(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("pipelines.training.launch.Crew.train", never)
    again = finetune([recordings], learned, work, PLAN, workers=0, precision="fp32")
    assert again == done


@pytest.mark.slow
def test_interrupted_adapters_continue_to_the_bit_and_checkpoints_leave_the_base_out(learned: Path, tmp_path: Path) -> None:
    store = str(learned.parent / "store")

    def train(work: Path, steps: int) -> Path:
        variant = small(steps=4)
        recipes = replace(variant.recipes, joint=replace(variant.recipes.joint, steps=steps, decay="constant", checkpoint_every=1))
        settings: dict[str, Any] = {"store": store, "workers": 0, "precision": "fp32", "init_from": str(learned), "lora": 4}
        inputs = {name: folder for name, folder in frozen_of(learned).items() if name != "audiomae"}
        return train_stage("joint", replace(variant, recipes=recipes), work, given=inputs, **settings).path

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    parts = train(tmp_path / "parts", 4)
    assert read_card(parts, "joint")["steps"] == 4 and largest_difference(whole, parts) == 0.0
    assert read_card(parts, "joint")["validation_at_start"] == read_card(whole, "joint")["validation_at_start"]
    checkpoint = sum(path.stat().st_size for path in (tmp_path / "parts" / "runs" / "joint-lora" / "step_00000004").iterdir())
    frozen = sum(path.stat().st_size for name in ("unet", "language_model") for path in (learned / name).glob("*.safetensors"))
    assert checkpoint < frozen / 4


@pytest.mark.slow
def test_all_weights_can_be_finetuned(learned: Path, recordings: Path, tuned: Any, tmp_path: Path) -> None:
    """On the store and features that are there; the result is one bundle, its frozen parts those of the start."""
    (tmp_path / "store").symlink_to(tuned[0] / "store")
    done = finetune([recordings], learned, tmp_path, Plan(stage="diffusion", rank=0, steps=4), workers=0, precision="fp32")
    assert done.released.path == tmp_path / "stages" / "diffusion" and set(done.before) == {"noise"}
    changed = {name.split("/")[0] for name, tensor in weights(done.bundle.path).items() if not tensor.equal(weights(learned)[name])}
    assert changed == {"unet"}


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_a_bundle_that_says_too_little_is_refused(bundle: Path, tmp_path: Path) -> None:
    """The random one of the tests has other sizes than the variant it names, and no AudioMAE."""
    assert "audiomae" not in frozen_of(bundle)
    with pytest.raises(UserError, match="GPT-2 writes 4 vectors in .*, 2 in audioldm2-full-tiny"):
        variant_of(bundle)
    (public := tmp_path / "public").mkdir()
    for path in bundle.iterdir():
        if path.name != "loa.json":
            (public / path.name).symlink_to(path)
    with pytest.raises(UserError, match="does not say which variant it is .*`loa import .* --out DIR`"):
        variant_of(public)


def test_adapters_need_something_to_adapt(tmp_path: Path) -> None:
    variant = small()
    make_store(tmp_path, variant, clips=8, passes=())
    with pytest.raises(UserError, match="--lora 4: adapters need the weights that they adapt; name a bundle or a released diffusion"):
        train_stage("diffusion", variant, tmp_path, workers=0, lora=4)


def test_what_cannot_be_finetuned(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'vae' cannot be finetuned like this; expected joint, translator, diffusion"):
        finetune([tmp_path], bundle, tmp_path, Plan(stage="vae"), workers=0)
    with pytest.raises(UserError, match="is where the finetuned bundle goes; choose another folder with --work"):
        finetune([tmp_path], bundle, bundle.parent, Plan(), workers=0)
    result = CliRunner().invoke(loa.main, ["finetune", str(tmp_path)])
    assert result.exit_code == 2 and "--bundle" in result.output
