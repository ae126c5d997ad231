"""The classifier: it learns, ignores what it cannot know, and comes back from disk the same.

Run alone: python -m pytest tests/test_classifier.py -q
"""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.classifier.model import Classifier, ClassifierConfig
from stages.classifier.training import UNKNOWN, ClassifierStage, augment
from stages.errors import UserError

FLOOR = math.log(1e-5)
CONFIG = ClassifierConfig(width=8)
VARIANT = SimpleNamespace(classifier=CONFIG)


def clip(label: str, seed: int, frames: int = 64) -> dict:
    """A log-mel clip with a band whose height is its label."""
    rng = np.random.default_rng(seed)
    mel = rng.normal(-10.0, 0.5, (frames, 64))
    band = {"low": 8, "middle": 30, "high": 52}[label]
    mel[:, band : band + 6] += 8.0
    return {"labels": np.array([label, "sound"], object), "mel": mel.astype(np.float16)}


def batch_of(stage: ClassifierStage, clips: list[dict], seed: int = 0) -> dict[str, torch.Tensor]:
    examples = [stage.example(c, np.random.default_rng([seed, i])) for i, c in enumerate(clips)]
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


@pytest.fixture
def clips():
    return [clip(label, seed) for seed, label in enumerate(["low", "middle", "high"] * 4)]


@pytest.fixture
def stage(clips, tmp_path):
    torch.manual_seed(0)
    ClassifierStage.prepare(VARIANT, lambda name: tmp_path, SimpleNamespace(texts=lambda: iter(clips)), tmp_path)
    return ClassifierStage.build(VARIANT, lambda name: tmp_path)


def test_classes_come_from_the_training_clips(stage, tmp_path):
    assert json.loads((tmp_path / "classes.json").read_text()) == ["high", "low", "middle"]
    assert stage.model.config.classes == ("high", "low", "middle")
    assert ClassifierStage.needs == ("labels",)
    for labels, enough in ((["low", "high"], True), (["low", "low"], False), ([], False)):
        source = SimpleNamespace(texts=lambda labels=labels: ({"labels": [label]} for label in labels))
        assert ClassifierStage.learns_from(source) == enough


def test_it_learns_to_tell_bands_apart(stage, clips):
    optimiser = torch.optim.AdamW(stage.parts()["classifier"].parameters(), 3e-3)
    for step in range(25):
        for part, loss, logs in stage.losses(batch_of(stage, clips, step)):
            assert part == "classifier" and logs["accuracy"] <= 1
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    unheard = [clip(label, 100 + seed) for seed, label in enumerate(["high", "low", "middle"])]
    measures = stage.validate(batch_of(stage, unheard))
    assert measures["accuracy"] == 1.0 and measures["cross_entropy"] < 0.5


def test_labels_unknown_in_training_count_for_nothing(stage, clips):
    known = batch_of(stage, clips)
    stranger = batch_of(stage, [*clips, {**clip("low", 50), "labels": ["theremin"]}])
    assert stranger["target"][-1] == UNKNOWN
    for name, value in stage.validate(known).items():
        torch.testing.assert_close(stage.validate(stranger)[name], value)
    nobody = {key: value[-1:] for key, value in stranger.items()}
    assert [value.item() for value in stage.validate(nobody).values()] == [0.0, 0.0]


def test_augmentation_does_what_its_numbers_say():
    mel = torch.arange(32 * 16.0).view(1, 32, 16)
    batch = {"mel": mel, "roll": torch.tensor([3]), "gain": torch.tensor([0.5]), "hide": torch.tensor([[[4, 8], [0, 2]]])}
    out = augment(batch)
    expected = mel.roll(3, 1) + 0.5
    expected[:, 4:8] = FLOOR
    expected[:, :, 0:2] = FLOOR
    torch.testing.assert_close(out, expected)
    quiet = augment({**batch, "mel": torch.full_like(mel, FLOOR), "gain": torch.tensor([-0.5])})
    assert quiet.min() == pytest.approx(FLOOR)


def test_augmentation_repeats_and_keeps_most_of_a_clip(stage, clips):
    first, again, other = (batch_of(stage, clips, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["roll"], other["roll"])
    hidden = (first["hide"][..., 1] - first["hide"][..., 0]).amax(0)
    assert (hidden <= 8).all()  # an eighth of 64


@pytest.mark.parametrize("shape", [(256, 64), (1024, 64), (100, 256), (8, 8)])
def test_any_mel_will_do(shape):
    model = Classifier(ClassifierConfig(classes=("a", "b", "c"), width=8))
    mel = torch.randn(2, *shape)
    assert model.logits(mel).shape == (2, 3)
    assert model.embedding(mel).shape == (2, 128)
    torch.testing.assert_close(model.logits(mel)[:1], model.logits(mel[:1]))  # no clip sees its neighbours


def test_saving_and_loading(stage, clips, tmp_path):
    stage.save(tmp_path / "classifier")
    loaded = Classifier.load(tmp_path / "classifier")
    assert loaded.config == stage.model.config and not loaded.training
    mel = batch_of(stage, clips)["mel"]
    assert torch.equal(loaded.logits(mel), stage.model.logits(mel))
    with pytest.raises(UserError, match="loa train classifier"):
        Classifier.load(tmp_path / "elsewhere")


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="at least two classes"):
        Classifier(ClassifierConfig(classes=("only",)))
    with pytest.raises(UserError, match="no multiple"):
        ClassifierConfig(width=12)
    parameters = sum(p.numel() for p in Classifier(ClassifierConfig(classes=tuple("abcdefghij"))).parameters())
    assert 200_000 < parameters < 500_000
