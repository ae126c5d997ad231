"""The one loop: resume equals uninterrupted, two workers equal one, every stage of every variant trains and releases."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_store import largest_difference, make_store, small, weights, whole_line
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import GPT2LMHeadModel

from pipelines.export import export
from pipelines.features.store import FeatureStore
from pipelines.preprocess import PASSES, build_pass
from pipelines.preprocess import main as preprocess
from pipelines.train import main, train_stage
from pipelines.training import guards, loop
from pipelines.training.checkpoint import Checkpoints, TrainingState
from pipelines.training.dataset import ClipDataset
from pipelines.weights import released_folders
from stages import STAGES
from stages.base import Stage, read_card, stage_class
from stages.config import Recipe
from stages.errors import UserError
from stages.variants import VARIANTS, Recipes, Variant, resolve

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Variant]:
    """A project folder in which the whole tiny line was trained for four steps a stage."""
    return whole_line(tmp_path_factory.mktemp("line"), small())


# ---------------------------------------------------------------------------------------------------------- recipes


def test_learning_rate_warms_up_and_decays() -> None:
    recipe = Recipe(100, 4, 1.0, warmup_steps=10, decay="linear")
    assert recipe.rate_at(0, 0.0, 0) == pytest.approx(0.1)
    assert recipe.rate_at(9, 0.09, 0) == pytest.approx(1.0)
    assert recipe.rate_at(50, 0.5, 0) == pytest.approx(0.5)
    assert replace(recipe, decay="cosine").rate_at(100, 1.0, 0) == pytest.approx(0.0, abs=1e-12)


def test_recipes_are_the_published_ones() -> None:
    """Optimiser settings as references.md#optimisers gives them; tiny ones share all but the rates and lengths."""
    recipes = resolve("audioldm2-full").recipes
    assert {getattr(recipes, name).epsilon for name in Recipes.__dataclass_fields__} == {1e-8}
    assert (recipes.vae.betas, recipes.vae.weight_decay) == ((0.5, 0.9), 0.0)
    assert (recipes.vocoder.betas, recipes.vocoder.weight_decay, recipes.vocoder.learning_rate) == ((0.8, 0.99), 0.01, 2e-4)
    assert (recipes.diffusion.learning_rate, recipes.diffusion.warmup_steps, recipes.diffusion.ema_decay) == (1e-4, 10_000, 0.9999)
    assert {getattr(resolve("audioldm2-full", tiny=True).recipes, name).epsilon for name in Recipes.__dataclass_fields__} == {1e-8}


# ----------------------------------------------------------------------------------------------------- whole lines


def test_every_stage_releases_its_weights(line: tuple[Path, Variant]) -> None:
    work, variant = line
    for stage in STAGES:
        card = read_card(work / "stages" / stage, stage)
        assert card["steps"] == 4 and card["clips"] == 16
        assert all(np.isfinite(v) for v in card["validation"].values()), (stage, card["validation"])
        assert weights(work / "stages" / stage)


def test_finished_stage_is_left_alone(line: tuple[Path, Variant]) -> None:
    work, variant = line
    before = (work / "stages" / "vae" / "stage.json").stat().st_mtime_ns
    train_stage("vae", variant, work, workers=0)
    settings = ["recipes.vae.steps=4", "recipes.vae.max_seconds=null", "vae_loss.critic_start=2", "vocoder_loss.critic_start=2"]
    result = CliRunner().invoke(main, ["vae", "--tiny", "--work", str(work), *(w for s in settings for w in ("--set", s))])
    assert "vae: finished already, 4 steps" in result.output and "released" not in result.output
    assert (work / "stages" / "vae" / "stage.json").stat().st_mtime_ns == before


def test_a_store_without_labels_gets_the_right_sentence(tmp_path: Path) -> None:
    variant = small()
    make_store(tmp_path, variant, labels=[])
    told = (
        "classifier needs clips with labels, of at least two kinds: of the 18 training clips in .* 18 have captions, 0 labels and 18 transc"
    )
    with pytest.raises(UserError, match=told + ".*leave it out"):
        train_stage("classifier", variant, tmp_path, workers=0)


def test_a_store_without_words_gets_the_right_sentence(tmp_path: Path) -> None:
    variant = small()
    make_store(tmp_path, variant, labels=[], captions=[])
    with pytest.raises(UserError, match="clap needs clips with captions or labels: of the 18 .* 0 have captions.*--with clap=FOLDER"):
        train_stage("clap", variant, tmp_path, workers=0)


def test_another_clip_length_is_told_alone(line: tuple[Path, Variant], tmp_path: Path) -> None:
    work, variant = line
    other = replace(variant, audio=replace(variant.audio, clip_seconds=5.12))
    with pytest.raises(UserError, match=r"other audio settings than audioldm2-full-tiny has \(clip_seconds: was 2.56, now 5.12\)"):
        train_stage("vae", other, tmp_path, store=str(work / "store"), workers=0)


def test_other_configuration_is_refused(line: tuple[Path, Variant]) -> None:
    work, variant = line
    other = replace(variant, vae=replace(variant.vae, latent_channels=4))
    with pytest.raises(UserError, match="latent_channels"):
        train_stage("vae", other, work, workers=0)


def test_missing_stage_names_the_command(tmp_path: Path, line: tuple[Path, Variant]) -> None:
    work, variant = line
    with pytest.raises(UserError, match="loa train clap"):
        train_stage("joint", variant, tmp_path, store=str(work / "store"), workers=0)


def folders_asked_for(stage: str, variant: Variant, work: Path, prepared: Path) -> set[str]:
    """The earlier stages whose folders `prepare` and `build` open."""
    cls, asked = stage_class(stage), set()

    def released(name: str) -> Path:
        asked.add(name)
        return prepared if name == "prepared" else work / "stages" / name

    prepared.mkdir(parents=True)
    cls.prepare(variant, released, ClipDataset(FeatureStore.open(work / "store"), cls, cls.reads(variant), "train"), prepared)
    cls.build(variant, released)
    return asked - {"prepared"}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_stages_say_what_they_build_on(line: tuple[Path, Variant], tmp_path: Path, dropout: float) -> None:
    work, variant = line
    variant = replace(variant, translator=replace(variant.translator, clap_dropout=dropout))
    for stage in STAGES:
        assert folders_asked_for(stage, variant, work, tmp_path / stage) == set(stage_class(stage).builds_on(variant)), stage


@pytest.fixture(scope="module")
def folders(line: tuple[Path, Variant], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The line's bundle, and the same as the hub would have it: no card, no AudioMAE, a language model without its head."""
    work, variant = line
    bundle = export(work, variant)
    public = tmp_path_factory.mktemp("public") / "audioldm2"
    shutil.copytree(bundle, public, ignore=shutil.ignore_patterns("loa.json", "audiomae", "language_model"))
    GPT2LMHeadModel.from_pretrained(bundle / "language_model").transformer.save_pretrained(public / "language_model")
    return {"bundle": bundle, "public": public}


@pytest.mark.parametrize("layout", ["bundle", "public"])
def test_bundles_and_diffusers_folders_serve_every_stage(
    line: tuple[Path, Variant], folders: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    """Also with a dropout of CLAP's embedding, for which the translator reads CLAP."""
    work, variant = line
    variant = replace(variant, translator=replace(variant.translator, clap_dropout=0.1))
    for stage in ("translator", "diffusion", "joint"):
        given = dict.fromkeys(stage_class(stage).builds_on(variant), str(folders[layout]))
        released = train_stage(stage, variant, tmp_path, store=str(work / "store"), given=given, workers=0)
        assert read_card(released, stage)["steps"] == 4
    scales = [json.loads((folder / "stages" / "joint" / "scale.json").read_text())["scale_factor"] for folder in (work, tmp_path)]
    assert scales[1] == pytest.approx(scales[0], rel=1e-9)  # the trained T-UNet's, not that of the latents here


@pytest.mark.parametrize("layout", ["bundle", "public"])
def test_bundles_and_diffusers_folders_serve_every_pass(line: tuple[Path, Variant], folders: dict[str, Path], layout: str) -> None:
    _, variant = line
    for name in ("loa", "latent", "text", "speech"):
        encoder = PASSES[name].encoder
        if (layout, encoder) == ("public", "audiomae"):
            with pytest.raises(UserError, match=r"lacks model\.safetensors; expected a released stage or a bundle that has one"):
                released_folders(Path(), {encoder: str(folders[layout])})
            continue
        work = build_pass(name, variant, released_folders(Path(), {encoder: str(folders[layout])}))
        work.load(torch.device("cpu"))
        assert work.recipe(work.series[0])["weights"]


@pytest.mark.parametrize("layout", ["bundle", "public"])
def test_exported_latents_keep_the_scale_of_the_given_unet(
    line: tuple[Path, Variant], folders: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    """The VAE's own release says 1: that scale would make any T-UNet sound wrong."""
    work, variant = line
    given = {"translator": str(folders[layout]), "diffusion": str(folders[layout])}
    out = export(work, variant, given=given, out=tmp_path / "mixed")
    expected, got = (
        json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] for folder in (Path(folders[layout]), out.path)
    )
    assert got == expected != 1.0


def test_a_unet_of_another_prediction_is_refused(line: tuple[Path, Variant], folders: dict[str, Path], tmp_path: Path) -> None:
    work, variant = line
    other = replace(variant, diffusion=replace(variant.diffusion, prediction="epsilon"))
    given = dict.fromkeys(stage_class("joint").builds_on(other), str(folders["bundle"]))
    with pytest.raises(UserError, match="predicts 'v_prediction', this variant 'epsilon'.*--set diffusion.prediction=v_prediction"):
        train_stage("joint", other, tmp_path, store=str(work / "store"), given=given, workers=0)


@pytest.mark.parametrize(
    ("stage", "given", "told"),
    [
        ("translator", "translator", "its weights are what this command trains"),
        ("translator", "vocoder", "translator does not read the weights of vocoder; it reads no other stage's"),
        ("diffusion", "translator", "it reads those of clap, vae, vocoder"),
        ("vae", "vaee", "did you mean 'vae'"),
    ],
)
def test_weights_that_a_stage_does_not_read_are_refused(
    line: tuple[Path, Variant], folders: dict[str, Path], tmp_path: Path, stage: str, given: str, told: str
) -> None:
    work, variant = line
    with pytest.raises(UserError, match=told):
        train_stage(stage, variant, tmp_path, store=str(work / "store"), given={given: str(folders["bundle"])}, workers=0)


def test_weights_that_a_pass_or_a_bundle_does_not_hold_are_refused(line: tuple[Path, Variant], folders: dict[str, Path]) -> None:
    work, variant = line
    said = CliRunner().invoke(preprocess, ["latent", "--work", str(work), "--tiny", "--with", f"clap={folders['bundle']}"]).output
    assert "the latent pass does not read the weights of clap; it reads those of vae" in said
    with pytest.raises(UserError, match="the bundle does not read the weights of classifier"):
        export(work, variant, given={"classifier": str(work / "stages" / "classifier")})


@pytest.mark.slow
def test_speech_line_trains(tmp_path: Path) -> None:
    work, variant = whole_line(tmp_path, small("audioldm2-ljs"))
    for stage in ("translator", "diffusion", "joint"):
        assert folders_asked_for(stage, variant, work, tmp_path / "asked" / stage) == set(stage_class(stage).builds_on(variant)), stage
    assert (work / "stages" / "joint" / "tokenizer_2").is_dir()
    assert read_card(work / "stages" / "joint", "joint")["steps"] == 4


@pytest.mark.parametrize("name", list(VARIANTS))
def test_tiny_twins_have_the_parts_of_their_big_ones(name: str) -> None:
    from stages.sizes import networks, parameters

    full, tiny = resolve(name), resolve(name, tiny=True)
    big, little = networks(full), networks(tiny)
    assert big.keys() == little.keys()
    assert all(parameters(little[k]) < parameters(big[k]) / 10 for k in big)
    assert tiny.loa_tokens(tiny.translator.pooling) == (8 if tiny.phonemes is None else 256)


def test_parameter_counts_are_the_published_ones() -> None:
    from stages.sizes import networks, parameters

    expected = {
        "audioldm2-full": {"diffusion": 346_943_496, "vae": 55_376_873, "vocoder": 55_264_897, "clap": 193_913_882, "t5": 341_231_104},
        "audioldm2-full-large": {"diffusion": 718_012_296},
        "audioldm2-ljs": {"diffusion": 261_926_536},
    }
    for name, counts in expected.items():
        nets = networks(resolve(name))
        assert {k: parameters(nets[k]) for k in counts} == counts
    translator = networks(resolve("audioldm2-full"))["translator"]
    assert parameters(translator.language_model) == 124_439_808
    assert parameters(translator.projection_model) == 1_184_256


# ------------------------------------------------------------------------------------------------------- one step


class Reads(TorchFunctionMode):
    """Counts, by function of the loop and its guards, the calls that bring a value of a tensor to the host."""

    NAMES = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        caller = sys._getframe(1).f_code
        if getattr(func, "__name__", "") in self.NAMES and caller.co_filename in (loop.__file__, guards.__file__):
            self.counts[caller.co_name] += 1
        return func(*args, **(kwargs or {}))


def test_logged_values_are_read_once_per_log(line: tuple[Path, Variant], tmp_path: Path) -> None:
    """What makes the host wait for the device: one guard per part and step, two reads per log and one per validation."""
    work, variant = line
    recipe = replace(variant.recipes.vae, steps=2 * loop.LOG_EVERY, validate_every=8, checkpoint_every=100, global_batch=2)
    longer = replace(variant, recipes=replace(variant.recipes, vae=recipe), vae_loss=replace(variant.vae_loss, critic_start=5))
    with Reads() as reads:
        train_stage("vae", longer, tmp_path, store=str(work / "store"), workers=0)
    assert reads.counts.pop("_listen") == 3 * 2 * 2  # of each validation two pictures, as .cpu().numpy()
    assert reads.counts == {"_update": 20 + 15, "_mean": 2 + 3, "_read": 2}


class Toy(Stage):
    """Two parts, a critic and a generator, that write down when their losses are computed."""

    name = "toy"

    def __init__(self) -> None:
        super().__init__()
        self.critic, self.generator, self.events = nn.Linear(1, 1), nn.Linear(1, 1), list[str]()
        for part in self.parts().values():
            part.set_requires_gradient_sync = lambda last: None  # type: ignore[assignment]

    def parts(self) -> dict[str, nn.Module]:
        return {"critic": self.critic, "generator": self.generator}

    def losses(self, batch: dict[str, Any]) -> loop.Losses:
        fake = self.generator(batch["x"])
        for name, scores in (("critic", lambda: self.critic(fake.detach())), ("generator", lambda: self.critic(fake))):
            self.events.append(f"loss of the {name} on {int(batch['x'][0])}")
            loss = scores().mean()
            yield name, loss, {name: loss}


def toy_run(recipe: Recipe, world: int = 1) -> loop._Run:
    """The loop's state around a Toy, as worker 0 of `world`; its optimisers write down their steps and rates."""
    stage = Toy()
    optimizers = {name: torch.optim.SGD(part.parameters(), lr=0.1) for name, part in stage.parts().items()}
    for name, optimizer in optimizers.items():
        optimizer.register_step_post_hook(lambda optimizer, *_, name=name: stage.events.append(f"step of the {name}"))
    variant = resolve("audioldm2-full", tiny=True)
    job = loop.TrainJob("vae", replace(variant, recipes=replace(variant.recipes, vae=recipe)), "", "", {}, "", precision="fp32")
    workers = SimpleNamespace(rank=0, world=world, device=torch.device("cpu"))
    checkpoints = SimpleNamespace(wait=lambda: None)
    return loop._Run(job, workers, stage, TrainingState(stage.parts(), optimizers), checkpoints)  # type: ignore[arg-type]


def test_generator_is_judged_by_the_critic_that_all_micro_batches_trained() -> None:
    run = toy_run(Recipe(1, 4, 1e-3))
    logs = run._step([{"x": torch.tensor([[1.0], [1.0], [1.0]])}, {"x": torch.tensor([[2.0]])}])
    assert isinstance(run.stage, Toy)
    assert run.stage.events == [
        "loss of the critic on 1",
        "loss of the critic on 2",
        "step of the critic",
        "loss of the generator on 1",
        "loss of the generator on 2",
        "step of the generator",
    ]
    assert logs.keys() == {f"{kind}{part}" for kind in ("", "loss/", "grad_norm/") for part in ("critic", "generator")}


def test_workers_agree_on_the_time_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock, all workers ask for the longest time: before the first step and after each, and never else."""
    recipe = Recipe(1000, 2, 1.0, decay="linear", max_seconds=100.0, validate_every=7, checkpoint_every=5)
    run = toy_run(recipe, world=2)
    asked, rates, logged = [], [], []

    def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        if op == dist.ReduceOp.MAX:
            asked.append(float(tensor))
            tensor += 0.5  # the other worker began half a second earlier

    def step(batch: Any) -> dict[str, torch.Tensor]:
        rates.append([group["lr"] for optimizer in run.state.optimizers.values() for group in optimizer.param_groups])
        return {"loss": torch.ones(())}

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 4.0 * len(rates)))
    monkeypatch.setattr(loop, "training_batches", lambda *_: iter(lambda: None, 0))
    monkeypatch.setattr(run, "_step", step)
    for name in ("_validate", "_keep", "_tell"):
        monkeypatch.setattr(run, name, lambda *_, **__: {"measure": 1.0})
    tracker = SimpleNamespace(metrics=lambda values, step: logged.append((step, values["train/learning_rate"])))
    clips = SimpleNamespace(order=lambda seed: SimpleNamespace(length=8))
    run.fit(clips, range(8), tracker)  # type: ignore[arg-type]
    assert asked == [4.0 * k for k in range(26)]  # 25 steps of 4 s end a run of 100 s
    expected = [1.0 - (4.0 * k + 0.5) / 100 for k in range(25)]
    assert rates == [pytest.approx([rate, rate]) for rate in expected]  # both optimisers
    assert logged == [(k, pytest.approx(expected[k - 1])) for k in (10, 20, 25)]


# -------------------------------------------------------------------------------------- resume, workers, bad weather


def test_resumed_run_equals_the_uninterrupted_one(line: tuple[Path, Variant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The diffusion stage has every kind of state: EMA, dropout of conditions, posterior samples, noise."""
    work, variant = line
    given = {s: str(work / "stages" / s) for s in ("clap", "vae", "vocoder")}

    def run(folder: Path) -> Path:
        return train_stage("diffusion", variant, folder, store=str(work / "store"), given=given, workers=0).path

    calls = {"n": 0}
    save = Checkpoints.save

    def killed(self: Checkpoints, state: TrainingState) -> None:
        save(self, state)
        calls["n"] += 1
        if calls["n"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "interrupted")
    assert not (tmp_path / "interrupted" / "stages" / "diffusion").exists()
    resumed = run(tmp_path / "interrupted")
    assert largest_difference(resumed, work / "stages" / "diffusion") < 1e-6


# -------------------------------------------------------------------------------------------- what a run is made from


def test_a_finished_stage_says_that_it_is_out_of_date(
    line: tuple[Path, Variant], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The VAE is another one now: told of what is finished, refused for what continues. Where things lie does not matter."""
    work, variant = line
    shutil.copytree(work / "stages", tmp_path / "stages")
    shutil.copytree(work / "runs", tmp_path / "runs")
    shutil.copytree(work / "store", tmp_path / "store")
    train_stage("diffusion", variant, tmp_path, workers=0)
    assert "out of date" not in capsys.readouterr().err
    path = tmp_path / "stages" / "vae" / "vae" / "diffusion_pytorch_model.safetensors"
    before = path.read_bytes()
    save_file({key: value + 1 for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    train_stage("diffusion", variant, tmp_path, workers=0)
    assert "diffusion is out of date: the weights of vae changed since; --fresh trains it again" in capsys.readouterr().err
    longer = replace(variant, recipes=replace(variant.recipes, diffusion=replace(variant.recipes.diffusion, steps=6)))
    with pytest.raises(UserError, match="the weights of vae changed since .*diffusion began; put them back to continue it"):
        train_stage("diffusion", longer, tmp_path, workers=0)
    path.write_bytes(before)
    train_stage("diffusion", longer, tmp_path, workers=0)
    assert read_card(tmp_path / "stages" / "diffusion", "diffusion")["steps"] == 6


@pytest.mark.slow
def test_two_ray_workers_equal_one_process(line: tuple[Path, Variant], tmp_path: Path, ray_cluster: object) -> None:
    """With epsilon = 1 an update is all but proportional to the gradient, so only the order of summation may differ.

    Adam's own 1e-8 would turn the rounding of a vanishing gradient into a share of a whole step.
    """
    work, variant = line
    given = {s: str(work / "stages" / s) for s in ("clap", "vae", "vocoder")}

    def run(workers: int, rate: float) -> Path:
        recipe = replace(variant.recipes.diffusion, learning_rate=rate, epsilon=1.0, weight_decay=0.0, ema_decay=0.5)
        proportional = replace(variant, recipes=replace(variant.recipes, diffusion=recipe))
        folder = tmp_path / f"{workers}-{rate}"
        return train_stage("diffusion", proportional, folder, store=str(work / "store"), given=given, workers=workers).path

    start, one, two = (weights(run(*args)) for args in ((0, 1e-12), (0, 1.0), (2, 1.0)))
    moved = torch.cat([(one[k] - start[k]).flatten() for k in one])
    apart = torch.cat([(one[k] - two[k]).flatten() for k in one])
    assert float(moved.norm()) > 1e-2
    assert float(apart.norm()) < 1e-3 * float(moved.norm())


def test_accumulated_micro_batches_equal_the_whole_batch(line: tuple[Path, Variant], tmp_path: Path) -> None:
    work, variant = line
    split = replace(variant, recipes=replace(variant.recipes, audiomae=replace(variant.recipes.audiomae, micro_batch=1)))
    folder = train_stage("audiomae", split, tmp_path, store=str(work / "store"), workers=0).path
    a, b = weights(work / "stages" / "audiomae"), weights(folder)
    moved = torch.cat([(a[k] - b[k]).abs().flatten() for k in a])
    assert float(moved.mean()) < 2e-5
