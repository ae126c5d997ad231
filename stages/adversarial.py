"""Adversarial objectives that the VAE and the vocoder share.

A critic here returns one list entry per sub-discriminator; losses over several sub-discriminators are summed, as
HiFi-GAN does. All sums are float32 whatever the autocast.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½ (E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))]) over logits of any shape."""
    return 0.5 * (F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean())


def hinge_adversarial_loss(fake: Tensor) -> Tensor:
    """-E[D(fake)]: what the critic's opponent minimises under the hinge game."""
    return -fake.float().mean()


def least_squares_discriminator_loss(real: Iterable[Tensor], fake: Iterable[Tensor]) -> Tensor:
    """Σ E[(1 - D(real))²] + E[D(fake)²] over sub-discriminators."""
    return _sum((1.0 - r.float()).square().mean() + f.float().square().mean() for r, f in zip(real, fake, strict=True))


def least_squares_adversarial_loss(fake: Iterable[Tensor]) -> Tensor:
    """Σ E[(1 - D(fake))²] over sub-discriminators."""
    return _sum((1.0 - f.float()).square().mean() for f in fake)


def feature_matching_loss(real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]]) -> Tensor:
    """Σ E|D_l(real) - D_l(fake)| over the layers of all sub-discriminators; the real side is a constant."""
    pairs = [pair for layers in zip(real, fake, strict=True) for pair in zip(*layers, strict=True)]
    return _sum(F.l1_loss(f.float(), r.detach().float()) for r, f in pairs)


def balance(main_gradient: Tensor, adversarial_gradient: Tensor, largest: float) -> Tensor:
    """Weight that makes the adversarial gradient as long as the main one: ‖main‖ / (‖adversarial‖ + 1e-4), at most `largest`."""
    ratio = main_gradient.float().norm() / (adversarial_gradient.float().norm() + 1e-4)
    return ratio.clamp(max=largest).detach()


def standing(real: Sequence[Tensor], fake: Sequence[Tensor], loss: Tensor, middle: float, at_chance: float) -> dict[str, Tensor]:
    """How a critic stands, for the log and for whoever watches over it.

    `critic_accuracy`: share of logits on their side of `middle`; 0.5 for a critic that says the same of everything.
    `critic_doubt`: its loss as a share of `at_chance`, that of a critic which cannot decide; near 0 it has nothing left to learn.
    """
    sides = zip(real, fake, strict=True)
    accuracy = torch.stack([0.5 * ((r > middle).float().mean() + (f <= middle).float().mean()) for r, f in sides]).mean()
    return {"critic_accuracy": accuracy, "critic_doubt": loss.detach() / at_chance}


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()
