"""Translator and T-UNet as one network, and how the two are finetuned together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.diffusion.model import TUNet
from stages.translator.model import Translator


@dataclass(frozen=True)
class JointConfig:
    """How the two are finetuned together (references.md#joint-finetuning)."""

    ground_truth: float = 0.25  # P_gt, per batch; the rest of the batches see the translator's own LOA. Speech: 1 (fidelity.md, row 14)
    translation_weight: float = 2.0  # the authors' step adds the translation loss twice (fidelity.md, row 2)


class System(nn.Module):
    """Translator and T-UNet as one part: one backward pass goes through both."""

    def __init__(self, translator: Translator, network: TUNet) -> None:
        super().__init__()
        self.translator, self.network = translator, network

    def forward(
        self,
        clap: Tensor,
        text: Tensor,
        mask: Tensor,
        loa: Tensor,
        noisy: Tensor,
        timestep: Tensor,
        use_truth: bool,
        without: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(noise prediction, teacher-forced LOA); gradients of the first reach the translator when it made the LOA.

        `without` gives what stands for the conditions of a batch that loses them: such a batch does not move the translator.
        """
        if without is not None:
            with torch.no_grad():  # the LOA is for the log alone
                forced = self.translator(clap, text, mask, loa=loa)
            return self.network(noisy, timestep, *without(loa, text, mask)), forced
        forced = self.translator(clap, text, mask, loa=loa)
        given = loa if use_truth else self.translator(clap, text, mask)
        return self.network(noisy, timestep, given, text, mask), forced
