"""GPT-2 stage: teacher forcing towards the LOA of the clip's own sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from stages.base import ClipSource, Stage, UserError
from stages.frozen import TextEncoders
from stages.text import clip_texts
from stages.translator.model import PhonemeEncoderConfig, Translator

if TYPE_CHECKING:
    from stages.variants import Variant


def build_translator(variant: Variant) -> Translator:
    """The variant's translator with fresh weights."""
    return Translator(
        variant.translator, variant.clap.projection_dim, variant.t5.width, variant.loa_tokens(variant.translator.pooling), variant.phonemes
    )


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
    """Puts CLAP's embedding of the empty text in place of a clip's own, with a probability and per clip (facts 5.1)."""

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

    Phonemes stay whole: their position table is added at all places (facts 5.3).
    """
    if batch["text"].dtype == torch.int64:
        return batch["text"], batch["text_mask"]
    length = max(1, int(batch["text_mask"].sum(1).max()))
    return batch["text"][:, :length], batch["text_mask"][:, :length]


def translation_loss(predicted: Tensor, loa: Tensor, kind: str) -> Tensor:
    """Mean absolute error (the authors' code) or mean squared error (the paper)."""
    if kind not in ("l1", "mse"):
        raise UserError(f"translator.loss is {kind!r}; expected l1 or mse")
    return F.l1_loss(predicted.float(), loa.float()) if kind == "l1" else F.mse_loss(predicted.float(), loa.float())


class TranslatorStage(Stage):
    """Conditions → LOA, trained on clips with words (or a transcript)."""

    name = "translator"
    any_corpus = False
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
    def prepare(cls, variant: Variant, released: Callable[[str], Path], dataset: ClipSource, folder: Path) -> None:
        ClapDropout.prepare(variant, released, folder)

    @classmethod
    def build(cls, variant: Variant, released: Callable[[str], Path]) -> TranslatorStage:
        drop_clap = ClapDropout.load(variant, released)
        return cls(build_translator(variant), variant.translator.loss, variant.text_length, variant.phonemes, drop_clap)

    @classmethod
    def wants(cls, row: Mapping[str, Any]) -> bool:
        return bool(clip_texts(row)[0]) or bool(row.get("transcript"))

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

    def save(self, folder: Path) -> None:
        self.translator.save(folder)
        if self.phonemes:
            self.phonemes.save_tokenizer(folder / "tokenizer_2")
