"""A batch in pieces: the gradients of the whole batch, with one piece's graph alive at a time, in GANs as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_vae
import test_vocoder
import torch
from test_train import toy_run
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from pipelines.training.checkpoint import TrainingState
from pipelines.training.loop import _Run
from stages.base import Stage
from stages.config import Recipe
from stages.vae.training import VAEStage
from stages.vocoder.model import CriticConfig
from stages.vocoder.training import VocoderStage

CLIPS = 4


class Saved(saved_tensors_hooks):
    """Counts the bytes that graphs keep for their way back, storages that several nodes keep once; parameters do not count."""

    def __init__(self, stage: nn.Module) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in stage.parameters()}
        self.holders: dict[int, int] = {}
        self.bytes = self.peak = 0
        super().__init__(self._pack, lambda kept: kept.tensor)

    def _pack(self, tensor: torch.Tensor) -> _Kept:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self.own:
            if not self.holders.get(place):
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
            self.holders[place] = self.holders.get(place, 0) + 1
        return _Kept(tensor, self)

    def dropped(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.holders:
            self.holders[storage.data_ptr()] -= 1
            if not self.holders[storage.data_ptr()]:
                self.bytes -= storage.nbytes()


class _Kept:
    def __init__(self, tensor: torch.Tensor, counter: Saved) -> None:
        self.tensor, self.counter = tensor, counter

    def __del__(self) -> None:
        self.counter.dropped(self.tensor)


def vae(**loss: Any) -> VAEStage:
    torch.manual_seed(0)
    return VAEStage(test_vae.CONFIG, replace(test_vae.LOSS, **loss), test_vae.AUDIO)


def vocoder(**loss: Any) -> VocoderStage:
    torch.manual_seed(0)
    return VocoderStage(test_vocoder.CONFIG, replace(test_vocoder.LOSS, **loss), test_vocoder.AUDIO)


def batch_of(stage: Stage) -> dict[str, torch.Tensor]:
    made = test_vae.make_batch(stage, CLIPS) if isinstance(stage, VAEStage) else test_vocoder.make_batch(stage, CLIPS)
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def run_of(stage: Stage) -> _Run:
    """The loop's state around a stage that is not sharded, with optimisers that step along the gradients."""
    for part in stage.parts().values():
        part.set_requires_gradient_sync = lambda last: None  # type: ignore[assignment]
    run = toy_run(Recipe(1, CLIPS, 1e-3, clip_norm=None))
    optimizers = {name: torch.optim.SGD(part.parameters(), lr=1e-3) for name, part in stage.parts().items()}
    return _Run(run.job, run.workers, stage, TrainingState(stage.parts(), optimizers), None)  # type: ignore[arg-type]


def step(stage: Stage, pieces: int) -> tuple[dict[str, torch.Tensor], int]:
    """How a step of the whole batch in so many pieces moves the parameters, and the most bytes that graphs keep meanwhile."""
    before = {name: p.detach().clone() for name, p in stage.named_parameters()}
    chunks = {name: value.chunk(pieces) for name, value in batch_of(stage).items()}
    cut = [{name: values[i] for name, values in chunks.items()} for i in range(pieces)]
    run = run_of(stage)
    with (saved := Saved(stage)):
        run._step(cut)
    return {name: p.detach() - before[name] for name, p in stage.named_parameters()}, saved.peak


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Of two moves, as a share of the first."""
    one, two = (torch.cat([move[name].flatten() for name in a]).double() for move in (a, b))
    return float((one - two).norm() / one.norm())


@pytest.mark.parametrize("make", [vae, vocoder])
def test_one_piece_of_a_gan_is_kept_at_a_time(make: Callable[..., Stage]) -> None:
    """A quarter of the whole batch's graphs, and not those of all pieces until the critic has been stepped."""
    (_, whole), (_, quarter) = step(make(), 1), step(make(), CLIPS)
    assert 0.2 * whole < quarter < 0.3 * whole, (whole, quarter)


@pytest.mark.parametrize("make", [vae, vocoder])
def test_computing_again_changes_nothing(make: Callable[..., Stage]) -> None:
    """To the bit the step of pieces whose graphs are kept, which needs the memory of the whole batch."""
    keeping = make()
    losses = keeping.losses
    keeping.losses = lambda batch: losses(batch | {"in_pieces": False})  # type: ignore[method-assign]
    (kept, more), (again, less) = step(keeping, CLIPS), step(make(), CLIPS)
    assert distance(kept, again) == 0.0 and less < 0.5 * more, (less, more)


@pytest.mark.parametrize(
    "make",
    [
        # Weights of the adversarial term that each piece measures on its own clips are the references' way; here they are all at the limit.
        lambda: vae(adaptive_limit=1e-3, adversarial_weight=1e5),
        # The power iterations of spectral norm count forwards, so critics of scales see other weights in every piece.
        lambda: vocoder(critics=CriticConfig(periods=(2, 3), period_channels=(4, 8, 8), scales=0)),
    ],
    ids=["vae", "vocoder"],
)
def test_the_pieces_gradients_are_the_whole_batchs(make: Callable[[], Stage]) -> None:
    (whole, _), (pieces, _) = step(make(), 1), step(make(), CLIPS)
    assert distance(whole, pieces) < 1e-4  # 3e-5 of it is the rounding of weights before and after a step
    critics = [name for name in whole if name.startswith("discriminator")]
    assert critics and distance({n: whole[n] for n in critics}, {n: pieces[n] for n in critics}) < 1e-4
