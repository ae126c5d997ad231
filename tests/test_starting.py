"""Stages that begin with given weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from tiny_store import largest_difference, make_store, small
from transformers import GPT2Config, GPT2Model

from pipelines.tracking import Tracker
from pipelines.train import train_stage
from pipelines.weights import start_folder
from stages import STAGES
from stages.base import Stage, read_card, stage_class
from stages.clap.model import train_tokenizers
from stages.errors import UserError
from stages.files import Place
from stages.starting import start_from
from stages.variants import Variant, resolve

TINY = resolve("audioldm2-full", tiny=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in diffusers' layout with random weights of the tiny sizes, and beside it what runs prepare."""
    root = tmp_path_factory.mktemp("start")
    (prepared := root / "prepared").mkdir()
    captions = ["A dog barks twice.", "Rain falls on a tin roof.", "Somebody plays a slow tune on a piano."]
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), train_tokenizers(captions, TINY.clap, TINY.t5), strict=True):
        tokenizer.save_pretrained(prepared / name)
    (prepared / "scale.json").write_text('{"scale_factor": 0.5}')
    (prepared / "classes.json").write_text('["a", "b"]')
    np.save(prepared / "null_text.npy", np.zeros((1, TINY.t5.width), np.float32))
    np.save(prepared / "null_clap.npy", np.zeros(TINY.clap.projection_dim, np.float32))
    for stage in ("clap", "vae", "vocoder", "translator", "diffusion"):
        fresh(stage, root / "bundle").save(root / "bundle")
    (root / "bundle" / "discriminator.safetensors").unlink()
    return root / "bundle"


def fresh(stage: str, bundle: Path) -> Stage:
    """The stage as it is built, with those of the bundle before it."""
    prepared = bundle.parent / "prepared"
    return stage_class(stage).build(TINY, lambda name: prepared if name == "prepared" else bundle)


def states(stage: Stage) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {k: v.clone() for k, v in network.state_dict().items()} for name, network in stage.homes().items()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_starts_from_its_own_release(stage: str, bundle: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = fresh(stage, bundle)
    first.save(tmp_path)
    torch.manual_seed(2)
    other = fresh(stage, bundle)
    changed = [name for name, state in states(other).items() if not equal(state, states(first)[name])]
    assert changed or stage == "joint"  # joint is built from the earlier stages' weights
    started = start_from(other, tmp_path, "earlier")
    assert started.fresh == {} and all(equal(state, states(first)[name]) for name, state in states(other).items())


@pytest.mark.parametrize("stage", ["clap", "vae", "vocoder", "translator", "diffusion", "joint"])
def test_stages_start_from_a_bundle(stage: str, bundle: Path) -> None:
    """A folder in diffusers' layout; it has no critics, so these begin fresh, and the summary says so."""
    torch.manual_seed(3)
    begun = fresh(stage, bundle)
    started = start_from(begun, start_folder(stage, str(bundle)).path, str(bundle))
    assert set(started.fresh) == ({"discriminator.safetensors"} if stage in ("vae", "vocoder") else set())
    assert ("weights of discriminator.safetensors begin fresh" in started.summary()) == (stage in ("vae", "vocoder"))
    for name, state in states(begun).items():
        if name in started.fresh:
            continue
        files = [load_file(path) for path in (bundle / name).glob("*.safetensors")]
        held = {key: value for file in files for key, value in file.items()}
        shared = held.keys() & state.keys()
        assert len(shared) > 5 and all(torch.equal(held[key], state[key]) for key in shared), name


def gpt2(folder: Path, **sizes: Any) -> Path:
    """A GPT-2 as the hub has it: without the head, its names without a prefix."""
    translator = TINY.translator
    config = GPT2Config(**{"vocab_size": translator.vocab, "n_positions": translator.positions, "n_embd": translator.width} | sizes)
    config.n_layer, config.n_head = sizes.get("n_layer", translator.layers), sizes.get("n_head", translator.heads)
    torch.manual_seed(7)
    GPT2Model(config).save_pretrained(folder)
    return folder


def test_the_translator_starts_from_gpt2(bundle: Path, tmp_path: Path) -> None:
    translator = fresh("translator", bundle)
    before = states(translator)
    started = start_from(translator, start_folder("translator", str(gpt2(tmp_path))).path, "gpt2")
    given, now = load_file(tmp_path / "model.safetensors"), states(translator)
    for name, value in given.items():
        assert torch.equal(now["language_model"][f"transformer.{name}"], value)
    assert equal(now["projection_model"], before["projection_model"])
    assert set(started.fresh) == {"projection_model"} and "weights of projection_model begin fresh" in started.summary()
    with pytest.raises(UserError, match="is a GPT-2, with which only the translator starts"):
        start_from(fresh("vae", bundle), tmp_path, "gpt2")


def test_other_sizes_and_heads_are_refused(bundle: Path, tmp_path: Path) -> None:
    wide = gpt2(tmp_path / "wide", n_embd=2 * TINY.translator.width)
    with pytest.raises(UserError, match=r"of another shape \(transformer.*instead of.*--init-allow shape leaves those fresh"):
        start_from(fresh("translator", bundle), wide, "wide")
    heads = gpt2(tmp_path / "heads", n_head=TINY.translator.heads * 2)
    with pytest.raises(UserError, match=r"has num_attention_heads \d, this variant \d: its weights would compute something else"):
        start_from(fresh("translator", bundle), heads, "heads", ["shape"])


def test_misfits_are_allowed_by_name(bundle: Path, tmp_path: Path) -> None:
    stage = fresh("classifier", bundle)
    stage.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    names = sorted(weights)
    gone, changed = names[0], next(name for name in reversed(names) if weights[name].ndim == 2)
    weights[changed] = weights[changed][:1].contiguous()
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="1 missing .*; 1 of another shape .*; --init-allow missing --init-allow shape leaves those fresh"):
        start_from(stage, tmp_path, "other")
    with pytest.raises(UserError, match=f"of another shape .{changed}"):
        start_from(stage, tmp_path, "other", ["missing"])
    assert start_from(stage, tmp_path, "other", ["missing", "shape"]).fresh == {"model.safetensors": sorted([gone, changed])}
    save_file(weights | {"stranger": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="1 unknown .stranger"):
        start_from(stage, tmp_path, "other", ["missing", "shape"])
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="damaged"):
        start_from(stage, tmp_path, "other")


def test_a_folder_without_the_network_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle / "vae", tmp_path / "vae")
    with pytest.raises(UserError, match="--init-from .*: the folder lacks vocoder"):
        start_folder("vocoder", str(tmp_path))
    with pytest.raises(UserError, match="no such file or folder, and a hub id looks like owner/name"):
        start_folder("vae", str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------------------- training


def test_a_full_translator_asks_for_gpt2(tmp_path: Path) -> None:
    full = resolve("audioldm2-full")
    make_store(tmp_path, full, clips=2, passes=())
    with pytest.raises(UserError, match="--init-from openai-community/gpt2, a folder of it, .* --init-from random begins with nothing"):
        train_stage("translator", full, tmp_path, workers=0)


def test_training_begins_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate of almost nothing leaves the start as it was; another start of the same run is refused."""
    still = replace(small(steps=2), recipes=replace(small(steps=2).recipes, vae=replace(small(steps=2).recipes.vae, learning_rate=1e-12)))
    make_store(tmp_path, still, clips=12)
    first = train_stage("vae", small(steps=2), tmp_path, workers=0)
    other = tmp_path / "other"
    with Tracker.open(f"sqlite:///{tmp_path}/mlflow.db", work=other, job="train-vae", variant="tiny") as tracker:
        settings: dict[str, Any] = {"store": str(tmp_path / "store"), "workers": 0, "tracker": tracker}
        output = train_stage("vae", still, other, init_from=str(first), **settings)
        tags = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(tracker.handle().run_id).data.tags
    assert json.loads(tags["loa.made_from"])["start"]["from"] == str(first)
    assert "vae starts from " in capsys.readouterr().err
    one, two = (load_file(folder.path / "vae" / "diffusion_pytorch_model.safetensors") for folder in (first, output))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6
    card = read_card(output, "vae")
    start = card["made_from"]["start"]
    assert start["from"] == str(first) and len(start["weights"]) == 64

    longer = replace(still, recipes=replace(still.recipes, vae=replace(still.recipes.vae, steps=4)))
    with pytest.raises(UserError, match="began with other weights .*leave --init-from out"):
        train_stage("vae", longer, other, store=str(tmp_path / "store"), workers=0, init_from=str(output))
    train_stage("vae", longer, other, store=str(tmp_path / "store"), workers=0)  # repeated without it: continues
    assert read_card(output, "vae")["steps"] == 4 and read_card(output, "vae")["made_from"]["start"] == start


def of_audiomae(steps: int, rate: float = 1e-3, **settings: Any) -> Variant:
    variant = small()
    recipe = replace(variant.recipes.audiomae, steps=steps, learning_rate=rate, checkpoint_every=1, validate_every=100, **settings)
    return replace(variant, recipes=replace(variant.recipes, audiomae=recipe))


def test_training_begins_with_what_another_run_has_come_to(tmp_path: Path) -> None:
    """A run that was never released, by its folder, by a checkpoint or by its project: the averaged weights, as they were then."""
    make_store(tmp_path, of_audiomae(1), clips=12)
    settings: dict[str, Any] = {"store": str(tmp_path / "store"), "workers": 0}
    theirs = tmp_path / "theirs"
    train_stage("audiomae", of_audiomae(1, ema_decay=0.9), theirs, **settings).path.rename(tmp_path / "one")
    train_stage("audiomae", of_audiomae(2, ema_decay=0.9), theirs, **settings).path.rename(tmp_path / "two")
    run = theirs / "runs" / "audiomae"
    forms = {"run": (run, "two", 2), "checkpoint": (run / "step_00000001", "one", 1), "project": (theirs, "two", 2)}
    for name, (source, expected, step) in forms.items():
        output = train_stage("audiomae", of_audiomae(1, 1e-12), tmp_path / name, init_from=str(source), **settings)
        assert largest_difference(output.path, tmp_path / expected) < 1e-6, name
        start = read_card(output, "audiomae")["made_from"]["start"]
        assert (start["from"], start["checkpoint"]) == (str(source), f"step_{step:08d}")

    train_stage("audiomae", of_audiomae(3, ema_decay=0.9), theirs, **settings)  # the other run goes on: ours began where it was
    output = train_stage("audiomae", of_audiomae(2, 1e-12), tmp_path / "run", **settings)
    assert read_card(output, "audiomae")["made_from"]["start"]["checkpoint"] == "step_00000002"
    assert largest_difference(output.path, tmp_path / "two") < 1e-6
    train_stage("audiomae", of_audiomae(2, 1e-12), tmp_path / "project", **settings)  # although that project has a release now
    released = train_stage("audiomae", of_audiomae(1, 1e-12), tmp_path / "released", init_from=str(theirs), **settings)
    assert largest_difference(released.path, theirs / "stages" / "audiomae") < 1e-6  # a project's release comes before its run


def test_runs_that_cannot_be_begun_from_are_refused(tmp_path: Path) -> None:
    make_store(tmp_path, of_audiomae(1), clips=12)
    train_stage("audiomae", of_audiomae(1), tmp_path, workers=0)
    run = tmp_path / "runs" / "audiomae"
    with pytest.raises(UserError, match="--init-from .*audiomae is a run of audiomae; expected one of vae"):
        train_stage("vae", small(steps=1), tmp_path, workers=0, init_from=str(run))
    wide = replace(of_audiomae(1), audiomae=replace(small().audiomae, width=64))
    with pytest.raises(UserError, match="--init-from .*: model.safetensors does not fit this variant: .* of another shape"):
        train_stage("audiomae", wide, tmp_path / "wide", store=str(tmp_path / "store"), workers=0, init_from=str(run))
    (run / "step_00000001" / "COMMIT").unlink()
    with (
        pytest.warns(UserWarning, match="no whole checkpoint"),
        pytest.raises(UserError, match="there is no whole checkpoint; train that run"),
    ):
        train_stage("audiomae", of_audiomae(1), tmp_path / "b", store=str(tmp_path / "store"), workers=0, init_from=str(run))


def test_a_start_that_did_not_fit_is_forgotten(tmp_path: Path, bundle: Path) -> None:
    """Before the first checkpoint another one may be given, and what was prepared for the first one goes."""
    make_store(tmp_path, small(steps=1), clips=12)
    wrong = tmp_path / "wrong"
    shutil.copytree(bundle, wrong)
    weights = load_file(wrong / "text_encoder" / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), wrong / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    (wrong / "tokenizer" / "note.txt").write_text("of the wrong one")
    with pytest.raises(UserError, match="1 missing"):
        train_stage("clap", small(steps=1), tmp_path, workers=0, init_from=str(wrong))
    assert (tmp_path / "runs" / "clap" / "prepared" / "tokenizer" / "note.txt").exists()
    output = train_stage("clap", small(steps=1), tmp_path, workers=0, init_from=str(bundle))
    assert not (tmp_path / "runs" / "clap" / "prepared" / "tokenizer" / "note.txt").exists()
    assert read_card(output, "clap")["made_from"]["start"]["from"] == str(bundle)


def test_what_belongs_to_a_start_comes_with_it(tmp_path: Path, bundle: Path) -> None:
    """CLAP's tokenizers: its text tower counts by them."""
    make_store(tmp_path, small(steps=1), clips=12)
    output = train_stage("clap", small(steps=1), tmp_path, workers=0, init_from=str(bundle))
    for name in ("tokenizer", "tokenizer_2"):
        assert (output.path / name / "tokenizer.json").read_bytes() == (bundle / name / "tokenizer.json").read_bytes()


def test_tiny_translators_say_that_they_begin_with_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.training.start import start_of

    assert start_of(stage_class("translator"), TINY, None, Place.of(tmp_path), {}) is None
    assert "translator: begins with random weights" in capsys.readouterr().err
    assert start_of(stage_class("translator"), resolve("audioldm2-full"), "random", Place.of(tmp_path), {}) is None
