"""What conditions a clip as training sees it: CLAP and T5 states, or voice and phonemes; how they are dropped and cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.frozen import TextEncoders
from stages.variants import Variant


def condition_example(clip: Mapping[str, Any], caption: int, text_length: int) -> dict[str, Tensor]:
    """What conditions a clip: caption number `caption` through CLAP and T5, or its voice and phonemes for speech.

    Returns clap [C], text [L, D] (int64 phoneme ids [L] for speech) and text_mask [L].
    """
    if "phonemes" in clip:
        ids = torch.from_numpy(np.asarray(clip["phonemes"], np.int64))[:text_length]
        return {"clap": torch.from_numpy(np.asarray(clip["clap_audio"], np.float32)), "text": ids, "text_mask": (ids != 0).long()}
    states = torch.from_numpy(np.asarray(clip["t5"][caption], np.float32))
    length = int(clip["t5_length"][caption])
    mask = (torch.arange(text_length) < length).long()
    return {
        "clap": torch.from_numpy(np.asarray(clip["clap_text"][caption], np.float32)),
        "text": F.pad(states[:text_length], (0, 0, 0, max(0, text_length - len(states)))),
        "text_mask": mask,
    }


class ClapDropout:
    """Puts CLAP's embedding of the empty text in place of a clip's own, with a probability and per clip (references.md#clap-dropout)."""

    def __init__(self, probability: float, null_clap: Tensor | None) -> None:
        self.probability, self.null_clap = probability, null_clap

    @classmethod
    def prepare(cls, variant: Variant, released: Callable[[str], Path], folder: Path) -> None:
        """Keep CLAP("") in `folder`, for `load`."""
        if variant.translator.clap_dropout:
            null = TextEncoders.load(released("clap")).clap_text([""])[0].numpy()
            np.save(folder / "null_clap.npy", null.astype(np.float32), allow_pickle=False)

    @classmethod
    def load(cls, variant: Variant, released: Callable[[str], Path]) -> ClapDropout:
        """As the variant has it, with what `prepare` kept."""
        probability = variant.translator.clap_dropout
        return cls(
            probability, torch.from_numpy(np.load(released("prepared") / "null_clap.npy", allow_pickle=False)) if probability else None
        )

    def __call__(self, example: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
        if self.null_clap is None or rng.random() >= self.probability:
            return example
        return example | {"clap": self.null_clap}


def cut_padding(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """text and text_mask of a batch without the columns that are padding for everyone.

    Phonemes stay whole: their position table is added at all places (references.md#phonemes).
    """
    if batch["text"].dtype == torch.int64:
        return batch["text"], batch["text_mask"]
    length = max(1, int(batch["text_mask"].sum(1).max()))
    return batch["text"][:, :length], batch["text_mask"][:, :length]
