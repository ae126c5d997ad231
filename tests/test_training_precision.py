"""The precision of a training: asked for, needed, or measured once without a trace, and kept by the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_store import largest_difference, make_store, small

from pipelines.train import train_stage
from pipelines.training import loop, precision
from pipelines.training.checkpoint import Checkpoints, Progress, TrainingState
from pipelines.training.precision import MARGIN, TIMED, WORTH, faster, measure, settled
from pipelines.training.workers import OneProcess
from stages.base import read_card, stage_class
from stages.errors import UserError
from stages.files import Place
from stages.vae.model import PatchCriticConfig
from stages.variants import Variant

CPU = torch.device("cpu")


def test_what_is_asked_for_and_what_is_measured() -> None:
    vae, unet = (stage_class(name).full_precision for name in ("vae", "diffusion"))
    assert vae and stage_class("vocoder").full_precision and not unet
    assert [settled(asked, vae, "", WORTH) for asked in ("auto", "fast", "bf16", "fp32")] == ["fp32", "", "bf16", "fp32"]
    assert [settled(asked, unet, "", WORTH) for asked in ("auto", "fast", "bf16", "fp32")] == ["", "", "bf16", "fp32"]
    assert settled("auto", unet, "", WORTH - 1) == "fp32"  # over before measuring pays
    assert settled("auto", unet, "bf16", WORTH) == settled("fast", vae, "bf16", WORTH) == "bf16"  # what the run has is kept
    assert settled("fp32", unet, "bf16", WORTH) == "fp32"  # unless the user says
    with pytest.raises(UserError, match="precision is 'half'; expected auto, fast, bf16, fp32"):
        settled("half", unet, "", WORTH)


def test_bf16_must_be_clearly_faster() -> None:
    assert faster({"bf16": 1.0, "fp32": 2.0}) == "bf16" == faster({"bf16": 1.0, "fp32": float("inf")})
    assert faster({"bf16": 2.0, "fp32": 1.0}) == "fp32" == faster({"bf16": MARGIN + 0.01, "fp32": 1.0})


def test_the_quicker_of_two_steps_counts_after_one_that_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 0.0, 7.0, 0.0, 4.0, 0.0, 9.0])
    steps: list[str] = []
    monkeypatch.setattr(precision, "time", type("Clock", (), {"monotonic": staticmethod(lambda: next(clock))}))
    assert measure(steps.append, CPU, 1) == {"bf16": 4.0, "fp32": 7.0}
    assert steps == ["bf16", "fp32"] * (1 + TIMED)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Variant]:
    """A project folder with a store, and the variant that it was made for."""
    variant = small()
    variant = replace(variant, vae=replace(variant.vae, block_channels=(8,) * 5, norm_groups=4))  # quick
    make_store(work := tmp_path_factory.mktemp("precision"), variant)
    return work, variant


@pytest.fixture
def trained(line: tuple[Path, Variant]) -> Callable[..., Path]:
    """A training of a few steps on the line's store, with everything that steps could disturb: averages, batch norm, dropout."""
    work, variant = line

    def run(stage: str, folder: Path, steps: int = 3, **options: Any) -> Path:
        recipe = replace(getattr(variant.recipes, stage), steps=steps, global_batch=2, checkpoint_every=1, decay="constant", ema_decay=0.9)
        batch_norm = PatchCriticConfig(channels=8, layers=2, norm="batch")
        loss = replace(variant.vae_loss, critic_start=0, critic=batch_norm)
        chosen = replace(variant, recipes=replace(variant.recipes, **{stage: recipe}), vae_loss=loss)
        return train_stage(stage, chosen, folder, store=str(work / "store"), workers=0, **options).path

    return run


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Short runs measure as well, and find fp32 faster whatever it takes here; returns the precisions of the steps."""
    steps: list[str] = []

    def measured(step: Callable[[str], None], *where: Any) -> dict[str, float]:
        def counted(name: str) -> None:
            steps.append(name)
            step(name)

        assert set(measure(counted, *where)) == {"bf16", "fp32"}
        return {"bf16": 0.2, "fp32": 0.1}

    monkeypatch.setattr(precision, "WORTH", 0)
    monkeypatch.setattr(loop, "measure", measured)
    return steps


@pytest.mark.parametrize("stage", ["vae", "vocoder", "clap"])
def test_measuring_leaves_no_trace(
    trained: Callable[..., Path], tmp_path: Path, measuring: list[str], stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The released weights, critics and running statistics included, are to the bit those of a run that measured nothing."""
    plain = trained(stage, tmp_path / "plain", precision="fp32")
    assert measuring == []
    capsys.readouterr()
    after = trained(stage, tmp_path / "measured", precision="fast")
    assert measuring == ["bf16", "fp32"] * 3
    assert capsys.readouterr().err.count(f"{stage}: trains in fp32; gradients of a step take 0.2 s in bf16 and 0.1 s in fp32") == 1
    assert largest_difference(plain, after) == 0.0
    assert read_card(after, stage)["precision"] == "fp32" and read_card(after, stage)["skipped_steps"] == 0


def test_a_run_keeps_its_precision(
    trained: Callable[..., Path], tmp_path: Path, measuring: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 was faster when it began; it is not asked again, and resumes to the same weights."""
    whole = trained("audiomae", tmp_path / "whole", 4, precision="bf16")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "faster", lambda seconds: "bf16")
        assert read_card(trained("audiomae", tmp_path / "run", 2), "audiomae")["precision"] == "bf16"
    assert len(measuring) == 6
    continued = trained("audiomae", tmp_path / "run", 4)
    assert read_card(continued, "audiomae")["precision"] == "bf16" and len(measuring) == 6
    assert largest_difference(whole, continued) == 0.0
    assert read_card(trained("audiomae", tmp_path / "run", 5, precision="fp32"), "audiomae")["precision"] == "fp32"


def test_checkpoints_of_an_older_loa_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They say nothing of precision."""
    world = OneProcess()
    try:
        part = torch.nn.Linear(2, 2)
        state = TrainingState({"part": part}, {"part": torch.optim.AdamW(part.parameters())}, progress=Progress(3, 12, 4.5, 1, "bf16"))
        tensors = state.tensors()
        checkpoints = Checkpoints(Place.of(tmp_path), 0)
        checkpoints.save(state)
        checkpoints.wait()
        checkpoints.resume(state, checkpoints.whole())
        assert state.progress == Progress(3, 12, 4.5, 1, "bf16")
        tensors["progress"].pop("precision")
        with monkeypatch.context() as patch:
            patch.setattr(TrainingState, "tensors", lambda self: tensors)
            checkpoints.save(state)
            checkpoints.wait()
        checkpoints.resume(state, checkpoints.whole())
        assert state.progress == Progress(3, 12, 4.5, 1, "")
    finally:
        world.close()
