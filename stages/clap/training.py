"""CLAP training: captions and sounds of the same clip are pulled together, all others pushed apart."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from transformers import AutoTokenizer

from stages.audio import resample
from stages.base import ClipSource, Stage
from stages.clap.model import ClapConfig, SecondTextTower, T5Config, clap_mel, train_tokenizers
from stages.errors import UserError
from stages.text import clip_texts
from stages.variants import Variant


def gather(x: Tensor) -> Tensor:
    """Rows of all workers, [W·B, D], with gradients for everyone's rows."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    return torch.cat(all_gather(x))


def contrast(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over the global batch of unit embeddings [B, D]; matching rows are the positives."""
    logits = scale * a @ b.T
    target = torch.arange(len(a), device=a.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


class Towers(nn.Module):
    """The two CLAP towers and, where T5 has to be trained too, a second text tower."""

    def __init__(self, clap: ClapConfig, t5: T5Config | None) -> None:
        super().__init__()
        self.clap = clap.build()
        self.second = SecondTextTower(t5, clap.projection_dim) if t5 else None
        # One temperature for all contrasts, starting at CLAP's 1/0.07; the model's own two scalars take its value on release.
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        self.clap.logit_scale_a.requires_grad_(False)
        self.clap.logit_scale_t.requires_grad_(False)

    def forward(self, batch: Mapping[str, Tensor], mel: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Unit embeddings [B, D] of the sounds, of the captions, and of the captions by the second tower."""
        sound = self.clap.get_audio_features(input_features=mel).pooler_output
        text = self.clap.get_text_features(input_ids=batch["clap_ids"], attention_mask=batch["clap_mask"]).pooler_output
        second = self.second(batch["t5_ids"], batch["t5_mask"]) if self.second is not None else None
        return F.normalize(sound, dim=-1), F.normalize(text, dim=-1), second


class ClapStage(Stage):
    """Contrastive training of CLAP (Wu et al. 2023), and of the T5 encoder by the same contrast.

    AudioLDM 2 takes both as public weights; this stage is for places where they cannot be had.
    """

    name = "clap"
    best_by = "contrast"
    needs = ("captions", "labels")
    series = ("waveform",)
    otherwise = "or train none, and give public weights to the jobs that read them, with --with clap=FOLDER"

    def __init__(self, clap: ClapConfig, t5: T5Config, sample_rate: int, tokenizers: Path) -> None:
        super().__init__()
        self.config, self.sample_rate = clap, sample_rate
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizers / "tokenizer")
        self.t5_tokenizer = AutoTokenizer.from_pretrained(tokenizers / "tokenizer_2")
        self.extractor = clap.feature_extractor()
        self.max_lengths = (clap.text_length, t5.max_length)
        self.towers = Towers(clap, t5)

    @classmethod
    def prepare(
        cls, variant: Variant, released: Callable[[str], Path], dataset: ClipSource, folder: Path, start: Path | None = None
    ) -> None:
        """Learn both tokenizers from the training captions, or take those of the start, whose tables count by them."""
        if start is not None:
            for name in ("tokenizer", "tokenizer_2"):
                if not (start / name).is_dir():
                    raise UserError(f"the start {start} has no {name}/; its text towers cannot be used without")
                shutil.copytree(start / name, folder / name)
            return
        captions = [text for row in dataset.texts() for text in clip_texts(row)]
        roberta, unigram = train_tokenizers(captions, variant.clap, variant.t5)
        roberta.save_pretrained(folder / "tokenizer")
        unigram.save_pretrained(folder / "tokenizer_2")

    @classmethod
    def build(cls, variant: Variant, released: Callable[[str], Path]) -> ClapStage:
        return cls(variant.clap, variant.t5, variant.audio.sample_rate, released("prepared"))

    @classmethod
    def asks(cls, variant: Variant) -> str:
        return "clips with captions or labels"

    def parts(self) -> dict[str, nn.Module]:
        return {"towers": self.towers}

    def example(self, clip: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        texts = clip_texts(clip)
        text = texts[int(rng.integers(len(texts)))]
        example = {"waveform": torch.from_numpy(np.asarray(clip["waveform"], np.float32))}
        # A circular shift and a gain cost nothing and keep the towers from hearing onset and level as content.
        shift, gain = int(rng.integers(len(example["waveform"]))), float(rng.uniform(0.5, 1.5))
        example["waveform"] = gain * torch.roll(example["waveform"], shift)
        for name, tokenizer, length in zip(("clap", "t5"), (self.tokenizer, self.t5_tokenizer), self.max_lengths, strict=True):
            tokens = tokenizer(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            example[f"{name}_ids"], example[f"{name}_mask"] = tokens.input_ids[0], tokens.attention_mask[0]
        return example

    def _embed(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.autocast(batch["waveform"].device.type, enabled=False):  # STFT in full precision
            mel = clap_mel(resample(batch["waveform"].float(), self.sample_rate, self.extractor.sampling_rate), self.extractor)
        cut: dict[str, Tensor] = {}
        for name in ("clap", "t5"):  # no tower needs to see columns that are padding for the whole batch
            length = int(batch[f"{name}_mask"].sum(1).max())
            cut |= {f"{name}_{k}": batch[f"{name}_{k}"][:, :length] for k in ("ids", "mask")}
        return self.towers(cut, mel)

    def losses(self, batch: dict[str, Any]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        sound, text, second = self._embed(batch)
        sound, text = gather(sound.float()), gather(text.float())
        scale = self.towers.log_scale.exp().clamp(max=100.0)
        loss = contrast(sound, text, scale)
        logs = {"contrast": loss, "accuracy": _retrieval(sound, text), "scale": scale[0]}
        if second is not None:
            t5_loss = contrast(sound, gather(second.float()), scale)
            logs["t5_contrast"] = t5_loss
            loss = loss + t5_loss
        yield "towers", loss, logs

    @torch.no_grad()
    def validate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`contrast` and `accuracy` among the clips of all workers: both depend on how many there are to choose from."""
        sound, text, second = self._embed(batch)
        sound, text = gather(sound.float()), gather(text.float())
        scale = self.towers.log_scale.exp().clamp(max=100.0)
        measures = {"contrast": contrast(sound, text, scale), "accuracy": _retrieval(sound, text)}
        return measures if second is None else measures | {"t5_accuracy": _retrieval(sound, gather(second.float()))}

    def homes(self) -> dict[str, nn.Module]:
        second = {} if self.towers.second is None else {"text_encoder_2": self.towers.second.encoder}
        return {"text_encoder": self.towers.clap, **second}

    def started(self, folder: Path) -> None:
        with torch.no_grad():
            self.towers.log_scale.copy_(self.towers.clap.logit_scale_a.reshape(1))

    def save(self, folder: Path) -> None:
        with torch.no_grad():
            self.towers.clap.logit_scale_a.copy_(self.towers.log_scale[0])
            self.towers.clap.logit_scale_t.copy_(self.towers.log_scale[0])
        self.towers.clap.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.extractor.save_pretrained(folder / "feature_extractor")
        if self.towers.second is not None:
            self.towers.second.encoder.save_pretrained(folder / "text_encoder_2")
            self.t5_tokenizer.save_pretrained(folder / "tokenizer_2")


def _retrieval(a: Tensor, b: Tensor) -> Tensor:
    """Share of rows of `a` whose nearest row of `b` is their own; captions repeated in a batch count as misses."""
    return ((a @ b.T).argmax(1) == torch.arange(len(a), device=a.device)).float().mean()
