"""GPT-2 stage: teacher forcing towards the LOA of the clip's own sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from stages.base import ClipSource, Stage
from stages.conditions import ClapDropout, condition_example, cut_padding
from stages.errors import UserError
from stages.translator.model import PhonemeEncoderConfig, Translator
from stages.variants import Variant


def build_translator(variant: Variant) -> Translator:
    """The variant's translator with fresh weights."""
    return Translator(
        variant.translator, variant.clap.projection_dim, variant.t5.width, variant.loa_tokens(variant.translator.pooling), variant.phonemes
    )


def translation_loss(predicted: Tensor, loa: Tensor, kind: str) -> Tensor:
    """Mean absolute error (the authors' code) or mean squared error (the paper)."""
    if kind not in ("l1", "mse"):
        raise UserError(f"translator.loss is {kind!r}; expected l1 or mse")
    return F.l1_loss(predicted.float(), loa.float()) if kind == "l1" else F.mse_loss(predicted.float(), loa.float())


class TranslatorStage(Stage):
    """Conditions → LOA, trained on clips with words (or a transcript)."""

    name = "translator"
    best_by = "loa_generated"  # what it writes by itself, as in use
    needs = ("captions", "labels", "transcript")
    any_corpus = False
    usual_start = "openai-community/gpt2"  # paper III-C
    blocks = (GPT2Block,)

    def __init__(
        self, translator: Translator, loss: str, text_length: int, phonemes: PhonemeEncoderConfig | None, drop_clap: ClapDropout
    ) -> None:
        super().__init__()
        self.translator, self.loss, self.text_length, self.phonemes = translator, loss, text_length, phonemes
        self.drop_clap = drop_clap

    @classmethod
    def reads(cls, variant: Variant) -> tuple[str, ...]:
        return f"loa-{variant.translator.pooling}", "speech" if variant.phonemes else "text"

    @classmethod
    def builds_on(cls, variant: Variant) -> tuple[str, ...]:
        return ("clap",) if variant.translator.clap_dropout else ()

    @classmethod
    def prepare(
        cls, variant: Variant, released: Callable[[str], Path], dataset: ClipSource, folder: Path, start: Path | None = None
    ) -> None:
        ClapDropout.prepare(variant, released, folder)

    @classmethod
    def build(cls, variant: Variant, released: Callable[[str], Path]) -> TranslatorStage:
        drop_clap = ClapDropout.load(variant, released)
        return cls(build_translator(variant), variant.translator.loss, variant.text_length, variant.phonemes, drop_clap)

    @classmethod
    def fits_usual_start(cls, variant: Variant) -> bool:
        return (variant.translator.width, variant.translator.layers, variant.translator.heads) == (768, 12, 12)

    @classmethod
    def asks(cls, variant: Variant) -> str:
        return "clips with transcripts" if variant.phonemes else "clips with captions or labels"

    def parts(self) -> dict[str, nn.Module]:
        return {"translator": self.translator}

    def example(self, clip: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        caption = 0 if "phonemes" in clip else int(rng.integers(len(clip["t5"])))
        conditions = self.drop_clap(condition_example(clip, caption, self.text_length), rng)
        return conditions | {"loa": torch.from_numpy(np.asarray(clip["loa"], np.float32))}

    def losses(self, batch: dict[str, Any]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        predicted = self.translator(batch["clap"], *cut_padding(batch), loa=batch["loa"])
        loss = translation_loss(predicted, batch["loa"], self.loss)
        yield "translator", loss, {"loa": loss}

    @torch.no_grad()
    def validate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        text, mask = cut_padding(batch)
        forced = self.translator(batch["clap"], text, mask, loa=batch["loa"])
        free = self.translator(batch["clap"], text, mask)
        mean = batch["loa"].mean(0, keepdim=True).expand_as(batch["loa"])  # what a translator deaf to words would say
        return {
            "loa": translation_loss(forced, batch["loa"], self.loss),
            "loa_generated": translation_loss(free, batch["loa"], self.loss),
            "loa_of_mean": translation_loss(mean, batch["loa"], self.loss),
        }

    def homes(self) -> dict[str, nn.Module]:
        return self.translator.homes()

    def save(self, folder: Path) -> None:
        self.translator.save(folder)
        if self.phonemes:
            self.phonemes.save_tokenizer(folder / "tokenizer_2")
